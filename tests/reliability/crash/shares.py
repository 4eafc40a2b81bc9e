"""Work in several processes of one thread each, which fork in their turn."""
import os
import pickle
import tempfile
import traceback
from pathlib import Path

from . import place, server


def in_shares(work, n, jobs):
    """[*work(share 0), *work(share 1), ...]: the numbers 0 .. n - 1 dealt out to `jobs` processes."""
    with tempfile.TemporaryDirectory(prefix="minifast-crash-") as folder:
        paths = [Path(folder, str(job)) for job in range(max(1, min(jobs, n)))]
        pids = [_fork(work, range(job, n, len(paths)), path) for job, path in enumerate(paths)]
        codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
        if any(codes):
            raise RuntimeError(f"processes of the test itself have ended with {codes}")
        return [result for path in paths for result in pickle.loads(path.read_bytes())]


def _fork(work, share, path):
    pid = os.fork()
    if pid:
        return pid
    try:
        place.renew()
        server.adopt_orphans()
        path.write_bytes(pickle.dumps(list(work(share))))
        os._exit(0)
    except BaseException:
        traceback.print_exc()
        os._exit(1)
