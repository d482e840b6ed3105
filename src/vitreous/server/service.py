"""`Service`: the model that answers now, the threads that compute, and the slots in front of them."""

import asyncio
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from vitreous.backend import count_cores
from vitreous.errors import RequestError, VitreousError
from vitreous.server.examples import Example
from vitreous.server.explaining import Explanations
from vitreous.server.logs import log
from vitreous.server.metrics import Metrics
from vitreous.server.served import ServedModel
from vitreous.server.settings import ServerConfig
from vitreous.server.slots import Slots

T = TypeVar("T")

_EXAMPLES_SECONDS = 5.0
"""How long the page waits for examples, which a large data set may take long to find."""


@dataclass(frozen=True)
class Current:
    """What answers now; a request keeps what it began with.

    Args:
        model: Predicts.
        explanations: Explains.
        examples: Images to offer, once they are loaded.
    """

    model: ServedModel
    explanations: Explanations
    examples: "Future[list[Example]]"


class Service:
    """What the routes work with.

    Args:
        path: A run, or an export.
        config: Limits.
        backend: Keras backend. Default: as for `Engine`.

    Raises:
        VitreousError: If the model cannot be loaded.
    """

    def __init__(self, path: Path, config: ServerConfig, *, backend: str | None = None):
        self.path = path
        self.config = config
        self.backend = backend
        self.metrics = Metrics()
        refused = self.metrics.refused
        self.slots = Slots(config.num_slots, "predictions", refused.labels("predict").inc)
        self.explain_slots = Slots(config.num_explain_slots, "explanations", refused.labels("explain").inc)
        self.threads = ThreadPoolExecutor(config.num_threads or count_cores(), thread_name_prefix="vitreous-work")
        self.explain_thread = ThreadPoolExecutor(1, thread_name_prefix="vitreous-explain")
        self.is_ready = False
        self._reloading = asyncio.Lock()
        self.current = self._load()

    def _load(self) -> Current:
        model = ServedModel(self.path, self.config, backend=self.backend)
        explanations = Explanations(model.run, self.config, backend=self.backend)
        examples: Future[list[Example]] = Future()
        # A daemon: a large data set may take minutes to list, and nobody should wait for that when the server stops.
        threading.Thread(target=lambda: examples.set_result(model.load_examples()), daemon=True).start()
        self.metrics.describe_model(model.name, model.engine.description)
        return Current(model, explanations, examples)

    def set_ready(self, is_ready: bool) -> None:
        """Says whether requests are wanted."""
        self.is_ready = is_ready
        self.metrics.is_ready.set(is_ready)

    async def reload(self) -> None:
        """Loads the model anew, beside the one that answers, and then puts it in its place. A broken one changes
        nothing.
        """
        async with self._reloading:
            try:
                new = await asyncio.get_running_loop().run_in_executor(self.explain_thread, self._load)
            except (VitreousError, OSError) as error:
                self.metrics.reloads.labels("failed").inc()
                log("reload failed, the model stays", level=40, reason=str(error))
                return
            old, self.current = self.current, new
            self.metrics.reloads.labels("done").inc()
            log("reloaded", model=new.model.name, engine=new.model.engine.description)
        await asyncio.sleep(self.config.deadline_seconds)  # who began with the old one has finished, or given up
        old.model.close()

    async def find_examples(self, current: Current) -> list[Example]:
        """Returns the examples; none while they are still being looked for."""
        examples = asyncio.wrap_future(current.examples)
        await asyncio.wait([examples], timeout=_EXAMPLES_SECONDS)
        return examples.result() if examples.done() else []

    async def compute(self, jobs: Sequence[Callable[[], T]]) -> list[T]:
        """Runs jobs in the threads that predict.

        Raises:
            RequestError: 504 if they take longer than the deadline; whatever a job raises.
        """
        return await self._run(self.threads, jobs, self.config.deadline_seconds, "--deadline-seconds")

    async def explain(self, job: Callable[[], T]) -> T:
        """Runs a job in the thread that explains; otherwise as `compute`."""
        return (await self._run(self.explain_thread, [job], self.config.explain_seconds, "--explain-seconds"))[0]

    async def _run(
        self, threads: ThreadPoolExecutor, jobs: Sequence[Callable[[], T]], seconds: float, option: str
    ) -> list[T]:
        loop = asyncio.get_running_loop()
        futures = [loop.run_in_executor(threads, job) for job in jobs]
        try:
            async with asyncio.timeout(seconds):
                return [await future for future in futures]
        except TimeoutError as error:
            raise RequestError(
                504,
                f"Too slow. Expected an answer within {seconds:g} s. Received: none by then. Try again later, or raise "
                f"{option}.",
            ) from error
        finally:
            for future in futures:
                future.cancel()  # what waits for a thread need not be computed for nobody

    def close(self) -> None:
        """Ends the threads."""
        for threads in (self.threads, self.explain_thread):
            threads.shutdown(wait=False, cancel_futures=True)
        self.current.model.close()
