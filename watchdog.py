"""Is everybody there, and in time? Who has ended, who is late, and where: the launcher, this rank and the others."""
import os
import signal
import threading
import time

from utils import tell

PARENT = os.getppid()  # noted before torch is imported, which takes seconds in which the launcher may end


def follow_launcher(leave, parent=PARENT, grace=20.0, sleep=time.sleep):
    """End this rank where torchrun, which started it, has ended without it: killed, it cannot end its ranks, which would train on unseen.

    As at SIGTERM, the update of the moment is finished and saved; after `grace` seconds this process ends however far it is, by
    leave(143). A thread looks who the parent is, as any Unix tells. It does not where a shell or a scheduler started this
    process: that may end before it. -> the thread, or None
    """
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return None

    def follow():
        while os.getppid() == parent:
            sleep(0.5)
        if os.environ.get("LOCAL_RANK", "0") == "0":  # one of a machine says it
            tell(f"error: torchrun (process {parent}) has ended before its ranks, most likely killed: they finish this update and stop")
        os.kill(os.getpid(), signal.SIGTERM)
        sleep(grace)
        leave(143)

    thread = threading.Thread(target=follow, daemon=True, name="follow_launcher")
    thread.start()
    return thread
