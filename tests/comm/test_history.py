"""The events of a process: calls are numbered alike on every rank, however few of them are kept."""

from __future__ import annotations

import random
import threading

from megatronish.comm.history import Call, Channel, Event, History, Wait, channel_of, place_waited_for

CALLS = (
    Call("all_reduce", "tp", 8, "float32", "sum"),
    Call("barrier", "tp"),
    Call("send", "pp", 4, "float32", peer=1),
    Call("receive", "pp", 4, "float32", peer=1),
    Call("send", "pp", 4, "float32", peer=0),
)


def test_kept_calls_have_their_numbers_from_the_start() -> None:
    choose = random.Random(3)
    for length in (0, 1, 7, 16, 17, 100):
        history, counts, expected = History(most=16, names_sites=False), dict.fromkeys(map(channel_of, CALLS), 0), []
        for _ in range(length):
            call = choose.choice(CALLS)
            history.call(call)
            expected.append(counts[channel_of(call)])
            counts[channel_of(call)] += 1
            if choose.random() < 0.3:
                history.begin_read("values")
                expected.append(-1)
        assert [number for _, number in history.numbered()] == expected[-16:]


def test_numbers_are_right_while_another_thread_makes_calls() -> None:
    history, stop = History(most=64, names_sites=False), threading.Event()

    def make_calls() -> None:
        number = 0
        while not stop.is_set():
            history.call(CALLS[0]._replace(tag=number))  # its tag is its number
            number += 1

    thread = threading.Thread(target=make_calls)
    thread.start()
    try:
        for _ in range(200):
            for entry, number in history.numbered():
                assert isinstance(entry.event, Call) and entry.event.tag == number
    finally:
        stop.set()
        thread.join()


def test_a_wait_finds_its_call() -> None:
    events: list[Event] = [CALLS[0], CALLS[2], CALLS[1], Wait("tp", 2), CALLS[0], Wait("tp", 1), Wait("tp", 9)]
    assert [place_waited_for(events, place) for place in (3, 5, 6)] == [0, 4, None]
    assert channel_of(CALLS[0]) == channel_of(CALLS[1]) == Channel("tp") and len(set(map(channel_of, CALLS))) == 4
