"""Outputs reach the event loop in order, from whatever thread."""

import asyncio
from concurrent.futures import ThreadPoolExecutor

from sharelora_serve.engine.request import RequestOutput
from sharelora_serve.server.mailbox import Mailbox

NUM_OUTPUTS = 2000


def test_every_receiver_gets_its_outputs_in_order_on_the_loops_thread() -> None:
    async def deliver() -> dict[str, list[int]]:
        mailbox, received = Mailbox(asyncio.get_running_loop()), {}
        with ThreadPoolExecutor(4) as pool:
            for name in "abcd":
                found = received[name] = []

                def receive(output: RequestOutput, found: list[int] = found) -> None:
                    assert asyncio.get_running_loop() is loop
                    found.extend(output.token_ids)

                send = mailbox.deliver_to(receive)
                pool.submit(
                    lambda send=send, name=name: [
                        send(RequestOutput(name, [index])) for index in range(NUM_OUTPUTS)
                    ]
                )
            loop = asyncio.get_running_loop()
            while any(len(found) < NUM_OUTPUTS for found in received.values()):
                await asyncio.sleep(0.001)
        return received

    received = asyncio.run(asyncio.wait_for(deliver(), 60))
    assert received == {name: list(range(NUM_OUTPUTS)) for name in "abcd"}


def test_outputs_of_one_step_are_handled_in_one_turn_of_the_loop() -> None:
    async def deliver() -> list[int]:
        found: list[int] = []
        mailbox = Mailbox(asyncio.get_running_loop())
        send = mailbox.deliver_to(lambda output: found.extend(output.token_ids))
        for index in range(64):
            send(RequestOutput("", [index]))
        assert found == [], "nothing is handled on the sender's stack"
        await asyncio.sleep(0)
        return found

    assert asyncio.run(deliver()) == list(range(64))


def test_an_output_after_the_loop_has_closed_is_dropped() -> None:
    async def make() -> Mailbox:
        return Mailbox(asyncio.get_running_loop())

    found: list[RequestOutput] = []
    asyncio.run(make()).deliver_to(found.append)(RequestOutput("", [1]))
    assert found == []
