"""`Batcher`: images of several requests computed together, where that pays: on a GPU."""

import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future

import numpy as np


class Batcher:
    """Gathers single images while a batch is computed, and computes them as the next one. Nobody waits for company.

    Args:
        compute: From uint8 (B, H, W, C) to an array with a row for each image.
        size: Images in a batch, at most.
    """

    def __init__(self, compute: Callable[[np.ndarray], np.ndarray], size: int):
        self.compute = compute
        self.size = size
        self.waiting: queue.SimpleQueue[tuple[np.ndarray, Future[np.ndarray]] | None] = queue.SimpleQueue()
        self.thread = threading.Thread(target=self._run, name="vitreous-batch", daemon=True)
        self.thread.start()

    def __call__(self, images: np.ndarray) -> np.ndarray:
        """Returns the rows of images (B, H, W, C), computed with those of others. May be called from many threads."""
        futures: list[Future[np.ndarray]] = [Future() for _ in images]
        for image, future in zip(images, futures, strict=True):
            self.waiting.put((image, future))
        return np.stack([future.result() for future in futures])

    def close(self) -> None:
        """Computes what waits, and ends the thread."""
        self.waiting.put(None)
        self.thread.join()

    def _run(self) -> None:
        is_over = False
        while not is_over:
            batch = []
            item = self.waiting.get()
            while item is not None:
                batch.append(item)
                if len(batch) == self.size or self.waiting.empty():
                    break
                item = self.waiting.get()
            is_over = item is None
            if batch:
                self._answer(batch)

    def _answer(self, batch: list[tuple[np.ndarray, "Future[np.ndarray]"]]) -> None:
        try:
            rows = self.compute(np.stack([image for image, _ in batch]))
        except Exception as error:  # those who wait shall know
            for _, future in batch:
                future.set_exception(error)
            return
        for (_, future), row in zip(batch, rows, strict=True):
            future.set_result(row)
