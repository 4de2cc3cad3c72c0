"""Reads pages as a guest does, in threads, and compares each with the original: ``reader.py FILE ORIGINAL THREADS``.

Page numbers come on standard input. What was wrong, and which errors there were, goes to standard output as JSON.
"""

from __future__ import annotations

import json
import os
import sys
import threading
from collections import Counter

PAGE = 4096


def main() -> None:
    path, original, threads = sys.argv[1], sys.argv[2], int(sys.argv[3])
    pages = [int(word) for word in sys.stdin.read().split()]
    want = os.open(original, os.O_RDONLY)
    right, wrong, errors = 0, [], Counter[str]()
    lock = threading.Lock()

    def read(mine: list[int]) -> None:
        nonlocal right
        try:
            descriptor = os.open(path, os.O_RDONLY)
        except OSError as error:
            with lock:
                errors[str(error.errno)] += len(mine)
            return
        # No readahead: each read is for its own page.
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_RANDOM)
        for page in mine:
            try:
                data = os.pread(descriptor, PAGE, page * PAGE)
            except OSError as error:
                with lock:
                    errors[str(error.errno)] += 1
                continue
            with lock:
                if data == os.pread(want, PAGE, page * PAGE):
                    right += 1
                else:
                    wrong.append(page)

    workers = [threading.Thread(target=read, args=(pages[number::threads],)) for number in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    print(json.dumps({"right": right, "wrong": wrong, "errors": errors}))


if __name__ == "__main__":
    main()
