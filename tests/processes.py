"""A test file that is also the program of a rank: processes joined by gloo run its checks, its tests read the outcomes.

Each process runs every check and writes down what went wrong with each, None if all is well.
"""

import datetime
import json
import os
import subprocess
import sys
import traceback
from pathlib import Path

import pytest
import torch

SECONDS = 900  # no deadline: only a hang takes so long, also on a busy machine


def run_rank(directory, ranks, checks, begin):
    """The program of a rank. Each check is called with what begin() makes once all are joined."""
    import torch.distributed as dist

    torch.set_num_threads(1)
    rank = int(os.environ["RANK"])
    dist.init_process_group(
        "gloo",
        init_method=f"file://{directory}/rendezvous",
        rank=rank,
        world_size=ranks,
        timeout=datetime.timedelta(seconds=300),
    )
    begun, results = begin(), {}
    for name, check in checks.items():
        torch.manual_seed(0)
        try:
            results[name] = check(begun)
        except (Exception, pytest.fail.Exception):
            results[name] = traceback.format_exc()
            break  # the ranks may be out of step now
    (Path(directory) / f"{rank}.json").write_text(json.dumps(results))
    if not any(results.values()):
        dist.barrier()
        dist.destroy_process_group()


def environment(**variables):
    above = str(Path(__file__).resolve().parents[1])
    return {**os.environ, "PYTHONPATH": os.pathsep.join([above, *sys.path]), **variables}


def outcomes_of(file, directory, ranks):
    """What every rank of the program `file` has to say of every check."""
    processes = [
        subprocess.Popen(
            [sys.executable, str(file), str(directory)],
            env=environment(RANK=str(rank)),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(ranks)
    ]
    try:
        said = [p.communicate(timeout=SECONDS)[0] for p in processes]
    finally:
        for p in processes:
            p.kill()
    files = [Path(directory) / f"{rank}.json" for rank in range(ranks)]
    assert all(f.is_file() for f in files), "\n".join(said)
    return [json.loads(f.read_text()) for f in files]


def assert_well(check, outcomes):
    for rank, said in enumerate(outcomes):
        assert check in said, f"rank {rank} failed before: {[k for k, v in said.items() if v]}"
        assert said[check] is None, f"rank {rank}: {said[check]}"
