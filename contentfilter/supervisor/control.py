"""The daemon's ear for the command line: takes questions, sees who asks, has them answered, one reply each.

Who may only look gets an answer to what only looks. A question that takes its time holds no other one up.
"""

import asyncio
import os
from collections.abc import Awaitable, Callable, Mapping

import zmq

from contentfilter.bus import messages
from contentfilter.bus.sockets import Client, SupervisorBus
from contentfilter.errors import RemoteProtocolError
from contentfilter.log import Logger

ControlHandler = Callable[[messages.Question, int], Awaitable[messages.Reply]]
"""From a question and the uid of who asks to the reply."""


async def answer_questions(
    bus: SupervisorBus,
    answers: Mapping[type, ControlHandler],
    log: Logger,
    malformed: Callable[[str, RemoteProtocolError], None],
) -> None:
    """Until it is cancelled. ``answers``: what to do for each type in frames.Question."""
    async with asyncio.TaskGroup() as group:
        while True:
            try:
                asker, question = await bus.question()
            except RemoteProtocolError as error:
                malformed("control", error)
                continue
            group.create_task(_answer(bus, answers, log, asker, question))


async def _answer(
    bus: SupervisorBus, answers: Mapping[type, ControlHandler], log: Logger, asker: Client, question: messages.Question
) -> None:
    try:
        if isinstance(question, messages.CHANGES) and asker.uid not in (0, os.geteuid()):
            log.warning("control.refused", uid=asker.uid, question=type(question).__name__)
            reply: messages.Reply = messages.Refused(
                f"only root and the daemon's user may do that, not uid {asker.uid}"
            )
        else:
            reply = await answers[type(question)](question, asker.uid)
    except Exception:
        log.exception("control.failed", question=type(question).__name__)
        reply = messages.Refused("a defect in the daemon; its log has it as control.failed")
    try:
        await bus.answer(asker, reply)
    except zmq.ZMQError:
        pass  # the asker is gone
