"""What a sound rehearsal was of: enough to tell whether it holds for a job that is to be submitted."""

from __future__ import annotations

import datetime
import hashlib
import json
import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

import megatronish
from megatronish.config import Config
from megatronish.config_loader import to_yaml
from megatronish.json_file import write_json
from megatronish.preflight.job import Job
from megatronish.preflight.rehearse_job import RehearsedJob

FILE_NAME = "certificate.json"


@dataclass(frozen=True)
class Certificate:
    """A rehearsal without a finding."""

    config: str
    """blake2b-128 of the resolved config, as YAML."""
    code: str
    """Of the package's Python sources."""
    world_size: int
    device_kind: str
    torch: str
    python: str
    logs: str
    """Of what every rank communicates."""
    ranks_run: int
    """The others were inferred."""
    passes_run: int
    """Forwards and backwards of microbatches, of the ranks that ran."""
    passes_inferred: int
    rules: tuple[str, ...]
    """Under which the job ends (preflight/order.py)."""
    date: str

    def holds_for(self, config: Config, *, world_size: int, device_kind: str) -> bool:
        """Whether it was given for this job, this code and these versions."""
        asked = (hash_of_config(config), hash_of_code(), world_size, device_kind, torch.__version__, platform.python_version())
        return asked == (self.config, self.code, self.world_size, self.device_kind, self.torch, self.python)


def issue(config: Config, rehearsed: RehearsedJob, *, code: str, device_kind: str, rules: Mapping[str, bool]) -> Certificate:
    """The certificate of a job that was just found sound. `code`: `hash_of_code` when its rehearsal began."""
    return Certificate(
        config=hash_of_config(config),
        code=code,
        world_size=rehearsed.job.num_ranks,
        device_kind=device_kind,
        torch=torch.__version__,
        python=platform.python_version(),
        logs=hash_of_logs(rehearsed.job),
        ranks_run=len(rehearsed.ran),
        passes_run=rehearsed.num_actions_run,
        passes_inferred=rehearsed.num_actions_inferred,
        rules=tuple(rule for rule, passes in rules.items() if passes),
        date=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    )


def write_certificate(folder: Path, certificate: Certificate) -> Path:
    """Put it into `folder`."""
    path = folder / FILE_NAME
    write_json(path, asdict(certificate))
    return path


def find_certificate(folder: Path, config: Config, *, world_size: int, device_kind: str) -> Certificate | None:
    """The certificate in `folder` if it holds for this job and this code."""
    try:
        values = json.loads((folder / FILE_NAME).read_text())
        certificate = Certificate(**{**values, "rules": tuple(values["rules"])})
    except (OSError, ValueError, TypeError, KeyError):
        return None
    return certificate if certificate.holds_for(config, world_size=world_size, device_kind=device_kind) else None


def hash_of_config(config: Config) -> str:
    """Of every field, defaults included."""
    return _digest(to_yaml(config).encode())


def hash_of_code() -> str:
    """Of the package's sources, by name and content."""
    root = Path(megatronish.__file__).parent
    digest = hashlib.blake2b(digest_size=16)
    for path in sorted(root.rglob("*.py")):
        digest.update(f"{path.relative_to(root).as_posix()}\0".encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()


def hash_of_logs(job: Job) -> str:
    """Of every rank's events and groups; call sites and times are not in it."""
    by_events: dict[int, bytes] = {}
    of_logs = []
    for log in job.logs:
        digest = hashlib.blake2b(digest_size=16)
        for moment, events, _ in log.spans:
            if id(events) not in by_events:
                text = repr([tuple(event._replace(site="")) for event in events])
                by_events[id(events)] = hashlib.blake2b(text.encode(), digest_size=16).digest()
            digest.update(f"{moment.phase}\0{moment.step}\0{moment.action}\0".encode())
            digest.update(by_events[id(events)])
        of_logs.append(digest.hexdigest())
    groups = hashlib.blake2b(digest_size=16)
    members_text: dict[int, str] = {}  # equal members are one object: a job has few
    for rank, log_number in enumerate(job.log_of):
        groups.update(f"{rank} {of_logs[log_number]}".encode())
        for name, members in job.groups[rank].items():
            if id(members) not in members_text:
                members_text[id(members)] = _digest(repr(members).encode())
            groups.update(f" {name} {members_text[id(members)]}".encode())
    return groups.hexdigest()


def _digest(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=16).hexdigest()
