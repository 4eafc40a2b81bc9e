"""One peer in a process of its own: its imports disturb no other. Started by peers.py; speaks JSON, a line each way.

    {"do": "check", "steps": 200}          -> {"version": "2.8.12"}, or {"error": "why not"}
    {"do": "round", "steps": 1000}         -> {"by hand": us per step, "default": ..., "leanest": ...}
"""
import contextlib
import copy
import gc
import json
import logging
import os
import sys
import time
import traceback
from importlib import metadata

import torch
from peer_loops import PEERS, by_hand, check, quietly
from workloads import MLP, Screen

ORDER = ("by hand", "default", "leanest")


def microseconds(train, model, batches, lean):
    model = copy.deepcopy(model)
    gc.collect()
    began = time.perf_counter()
    train(model, batches, lean)
    return 1e6 * (time.perf_counter() - began) / len(batches)


def answer(name, request, state):
    package, train = PEERS[name]
    if request["do"] == "check":
        batches = MLP.batches(request["steps"])
        for row, lean in (("default", False), ("leanest", True)):
            try:
                check(train, MLP.make_model, batches, lean)
            except AssertionError as error:
                said = " ".join(str(error).split())
                raise AssertionError(f"{row}: other weights than a plain loop's: {said}") from None
        return {"version": metadata.version(package)}
    if state.get("n") != request["steps"]:
        state.update(n=request["steps"], batches=MLP.batches(request["steps"]), model=MLP.make_model(), rounds=0)
    runs = {"by hand": (by_hand, False), "default": (train, False), "leanest": (train, True)}
    state["rounds"] += 1
    order = [ORDER[(state["rounds"] + k) % 3] for k in range(3)]
    return {row: microseconds(runs[row][0], state["model"], state["batches"], runs[row][1]) for row in order}


def main(name):
    # what peers write goes to a screen that keeps nothing; the answers have a channel of their own
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    logging.disable(logging.WARNING)
    state = {}
    with contextlib.redirect_stdout(Screen()), contextlib.redirect_stderr(Screen()), quietly():
        for line in sys.stdin:
            try:
                reply = answer(name, json.loads(line), state)
            except BaseException as error:
                last = traceback.extract_tb(error.__traceback__)[-1]
                where = f"{os.path.basename(last.filename)}:{last.lineno}"
                reply = {"error": f"{type(error).__name__}: {error!s:.300} ({where})"}
            answers.write(json.dumps(reply) + "\n")
            answers.flush()


if __name__ == "__main__":
    main(sys.argv[1])
