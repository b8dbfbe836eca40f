import logging

import pytest

from megatronish.errors import UserError
from megatronish.observe.log import setup_logging


@pytest.fixture(autouse=True)
def restore_logger():
    logger = logging.getLogger("megatronish")
    before, propagate = list(logger.handlers), logger.propagate
    yield
    for handler in [h for h in logger.handlers if h not in before]:
        logger.removeHandler(handler)
        handler.close()
    logger.propagate = propagate


def test_each_rank_writes_its_own_file_and_rank_0_the_terminal_too(tmp_path, capfd):
    setup_logging(tmp_path, rank=3, coordinates="pp0 dp1 tp1").info("loaded step %d in %.1f s", 7, 1.25)
    assert capfd.readouterr().err == ""
    setup_logging(tmp_path, rank=0, coordinates="pp0 dp0 tp0").warning("disk is slow")
    line_3 = (tmp_path / "logs/rank-00003.log").read_text()
    line_0 = (tmp_path / "logs/rank-00000.log").read_text()
    assert line_3.startswith("[pp0 dp1 tp1] ") and line_3.endswith(" loaded step 7 in 1.2 s\n")
    assert line_0.startswith("[pp0 dp0 tp0] ") and line_0.endswith(" WARNING: disk is slow\n")
    terminal = capfd.readouterr().err
    assert terminal.startswith("[pp0 dp0 tp0] ") and terminal.endswith(" WARNING: disk is slow\n")


def test_calling_twice_and_in_a_second_life_repeats_and_loses_no_line(tmp_path, capfd):
    for life in (1, 2):
        for _ in range(3):
            logger = setup_logging(tmp_path, rank=0, coordinates="pp0 dp0 tp0")
        logger.info("life %d", life)
    assert [line.split(" ", 5)[-1] for line in (tmp_path / "logs/rank-00000.log").read_text().splitlines()] == ["life 1", "life 2"]
    assert capfd.readouterr().err.count("\n") == 2


def test_a_logger_of_a_module_and_an_exception_with_its_trace_reach_the_file(tmp_path):
    setup_logging(tmp_path, rank=1, coordinates="pp0 dp0 tp1")
    try:
        raise RuntimeError("broken link")
    except RuntimeError:
        logging.getLogger("megatronish.checkpoint.save").exception("saving failed")
    text = (tmp_path / "logs/rank-00001.log").read_text()
    assert "ERROR: saving failed" in text and "Traceback" in text and "RuntimeError: broken link" in text


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "logs").write_text("a file in the way")
    with pytest.raises(UserError, match=r"rank-00000\.log: cannot be written .*run_root"):
        setup_logging(tmp_path, rank=0, coordinates="pp0 dp0 tp0")
