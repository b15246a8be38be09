"""The asyncio client and the real server."""

import asyncio

import numpy as np

from stepvideo_client import AsyncClient, Result
from tests.serving.calls import Server, Values


def test_generations_side_by_side_and_one_that_is_left(server: Server, small: Values) -> None:
    image = small["IMAGE"]
    assert isinstance(image, bytes)

    async def run() -> list[Result]:
        async with AsyncClient(server.grpc_url) as client:
            await client.wait_ready()

            async def one(seed: int, steps: int) -> Result:
                sizes = {"num_frames": 17, "height": 64, "width": 96}
                events = client.generate(image, "a cat", seed=seed, steps=steps, output="latents", **sizes)  # type: ignore[arg-type]
                last = [event async for event in events][-1]
                assert isinstance(last, Result)
                return last

            endless = asyncio.ensure_future(one(1, 200))
            first = await one(7, 2)
            endless.cancel()
            others = await asyncio.gather(one(7, 2), one(8, 2))
            return [first, *others]

    first, again, other = (result.data for result in asyncio.run(run()))
    np.testing.assert_array_equal(np.asarray(first), np.asarray(again))
    assert not np.array_equal(np.asarray(first), np.asarray(other))
