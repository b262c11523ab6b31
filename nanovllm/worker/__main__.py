"""`python -m nanovllm.worker ADDRESS`: an engine process, started by `WorkerClient`."""

import sys

from nanovllm.worker.process import main

if __name__ == "__main__":
    main(sys.argv[1])
