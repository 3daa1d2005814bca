"""The adapter directory, looked at every few seconds: new folders are served, changed ones replaced, others forgotten.

A folder is believed once two looks in a row found it the same, so that one which is being copied is left alone.
Renaming a complete folder into the directory is the way to add one; nothing is ever read from a folder whose name
begins with a dot.
"""

import threading
from collections.abc import Callable
from pathlib import Path

from trimtab.errors import TrimtabError
from trimtab.serving.store import Stamp, Store, UnknownAdapterError, folders, stamp


class Watch:
    """Keeps a store like a directory."""

    def __init__(self, store: Store, directory: Path, say: Callable[[str], None] = lambda line: None) -> None:
        self.store, self.directory, self._say = store, directory, say
        self._seen: dict[str, Stamp] = {}
        self._settled: dict[str, Stamp] = {}
        """What each folder was like when it was taken over, refused, or forgotten by its name: asked no second time."""
        self._is_over = threading.Event()
        self._thread: threading.Thread | None = None

    def first_look(self) -> None:
        """Registers every folder that is there."""
        for name, folder in sorted(folders(self.directory)):
            self._seen[name] = self._settled[name] = stamp(folder)
            self.store.register(name, folder)

    def look(self) -> None:
        """One look: what has settled since the last one is taken over."""
        with self.store.directory_lock:
            found = dict(sorted(folders(self.directory)))
            stamps = {name: stamp(folder) for name, folder in found.items()}
            for name, now in stamps.items():
                is_settled, self._seen[name] = self._seen.get(name) == now, now
                if self.store.stamp_of(name) == now:  # an upload, or what was taken over
                    self._settled[name] = now
                elif is_settled and self._settled.get(name) != now:
                    self._settled[name] = now
                    self._take_over(name, found[name])
            for name in [name for name in self._seen if name not in found]:
                del self._seen[name]
                if self._settled.pop(name, None) is not None:
                    self._forget(name)

    def remove(self, name: str, *, if_generation: int | None = None) -> None:
        """Forgets a name as `Store.remove` does, until its folder changes."""
        with self.store.directory_lock:
            self.store.remove(name, if_generation=if_generation)
            self._settled[name] = stamp(self.directory / name)

    def _take_over(self, name: str, folder: Path) -> None:
        try:
            if self.store.stamp_of(name) is not None and self.store.status(name).state == "resident":
                self._say(f"{name}: replaced by {self.store.replace(name, folder).version}")
            else:
                self.store.register(name, folder)
                self._say(f"{name}: added")
        except TrimtabError as error:
            self._say(f"{name}: not replaced; {error.what}")

    def _forget(self, name: str) -> None:
        try:
            self.store.remove(name)
            self._say(f"{name}: removed")
        except UnknownAdapterError:
            pass  # by HTTP, before

    def start(self, every_s: float) -> None:
        """Looks again and again, in a thread."""

        def run() -> None:
            while not self._is_over.wait(every_s):
                try:
                    self.look()
                except Exception as error:  # what one look meets must not be the end of all looks
                    self._say(f"the adapter directory could not be looked through: {error}")

        self._thread = threading.Thread(target=run, name="watch", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Ends the thread."""
        self._is_over.set()
        if self._thread is not None:
            self._thread.join()
