"What the benchmarks share; no benchmark itself."
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from statistics import median

import psutil

COMMAND = [sys.executable, "-c", "import sys; from hkust_demos.cli import main; sys.exit(main())"]


def timed(action: Callable[[], object], repeats: int = 9) -> tuple[float, object]:
    "(median seconds, result) of a call, after one that is not counted."
    result, seconds = action(), []
    for _ in range(repeats):
        begun = time.perf_counter()
        result = action()
        seconds.append(time.perf_counter() - begun)
    return median(seconds), result


def race(slow: Callable[[], object], fast: Callable[[], object], rounds: int) -> tuple[dict, object, object]:
    "(seconds and ratios, result of slow, result of fast); both take turns after a round that is not counted."
    seconds, cpu, results = [], [], (slow(), fast())
    for _ in range(rounds):
        marks = [(time.perf_counter(), time.process_time())]
        for action in (slow, fast):
            action()
            marks.append((time.perf_counter(), time.process_time()))
        for kept, column in ((seconds, 0), (cpu, 1)):
            kept.append([after[column] - before[column] for before, after in zip(marks, marks[1:])])
    best, best_cpu = ([min(column) for column in zip(*kept)] for kept in (seconds, cpu))
    ratios = [one / other for one, other in seconds]
    return {"slow_s": best[0], "fast_s": best[1], "ratio": best[0] / best[1], "ratio_cpu_time": best_cpu[0] / best_cpu[1],
            "ratio_rounds": {"slowest": min(ratios), "median": median(ratios)}}, *results


class Hub:
    "A hub of its own, with one thread; as a context it is ready when the block begins, and ended after it."

    def __init__(self):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        self.running = subprocess.Popen([*COMMAND, "demo", "--port", str(port)], env=environment, stdout=subprocess.DEVNULL)
        self.process = psutil.Process(self.running.pid)

    def __enter__(self) -> "Hub":
        try:
            return self._wait()
        except BaseException:
            self.__exit__()
            raise

    def __exit__(self, *_) -> None:
        self.running.terminate()
        self.running.wait()

    def _wait(self) -> "Hub":
        "Until it answers and its warming up has come to rest."
        limit, idle = time.monotonic() + 180, 0
        while idle < 4:
            if self.running.poll() is not None or time.monotonic() > limit:
                raise RuntimeError("the hub did not come up and rest within three minutes")
            idle = idle + 1 if self.process.cpu_percent(0.5) < 15 and self._answers() else 0
        return self

    def _answers(self) -> bool:
        "True once /health does."
        try:
            with urllib.request.urlopen(f"{self.url}/health", timeout=5) as answer:
                return answer.status == 200
        except (urllib.error.URLError, OSError):
            return False

    def _family(self) -> list[psutil.Process]:
        "The server and its children."
        return [self.process, *self.process.children(recursive=True)]

    def cpu_s(self) -> float:
        "CPU seconds so far."
        return sum(sum(process.cpu_times()[:2]) for process in self._family())

    def memory_mb(self) -> float:
        "Resident megabytes."
        return sum(process.memory_info().rss for process in self._family()) / 1e6
