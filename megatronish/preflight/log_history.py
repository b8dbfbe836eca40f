"""A history that becomes a log: events gathered by moment, with room for those of actions that were not run again."""

from __future__ import annotations

from collections.abc import Sequence

from megatronish.comm.history import Call, Entry, Event, History, Moment
from megatronish.preflight.job import Log, Span


class LogHistory(History):
    """All events of a rehearsed rank, as spans. An action of the schedule that communicates nothing has an empty one."""

    def __init__(self) -> None:
        self._spans: list[Span] = []
        self._events: list[Event] = []
        self._events_moment = Moment()
        self._known: dict[tuple[Event, ...], tuple[Event, ...]] = {}
        self._moment = Moment()
        super().__init__(most=0)

    @property
    def moment(self) -> Moment:
        """See History."""
        return self._moment

    @moment.setter
    def moment(self, moment: Moment) -> None:
        self.mark()
        left = self._moment
        if left.action and left != moment and (not self._spans or self._spans[-1].moment != left):
            self._spans.append(Span(left, ()))
        self._moment = moment

    def mark(self) -> None:
        """The events that follow begin a span of their own."""
        if self._events:
            events = tuple(self._events)
            self._spans.append(Span(self._events_moment, self._known.setdefault(events, events)))
            self._events = []

    def begin_action(self) -> None:
        """`mark`, and count exchanges anew: two actions that do the same have equal events."""
        self.mark()
        self._num_batches.clear()

    def since_mark(self) -> tuple[Event, ...]:
        """The events since `mark`; they end their span."""
        if not self._events:
            return ()
        self.mark()
        return self._spans[-1].events

    def infer(self, events: Sequence[Event]) -> None:
        """These happen now, though nothing runs."""
        self.mark()
        self._spans.append(Span(self.moment, tuple(events), is_inferred=True))
        for event in events:
            if isinstance(event, Call):
                self.num_calls[event.group] = self.num_calls.get(event.group, 0) + 1

    def log(self) -> Log:
        """Everything so far."""
        self.mark()
        return Log(tuple(self._spans))

    def _add(self, event: Event) -> Entry:
        if self.moment != self._events_moment:
            self.mark()
            self._events_moment = self.moment
        self._events.append(event)
        return Entry(0.0, self.moment, event)
