"""The adapter directory, looked at every few seconds: new folders are served, changed ones replaced, others forgotten.

A folder is believed once two looks in a row found it the same, or gone, so that one which is being copied or exchanged
is left alone. Renaming a complete folder into the directory is the way to add one; nothing is ever read from a folder
whose name begins with a dot. A name that is served from elsewhere, by the command line, keeps what it has.
"""

import threading
from pathlib import Path

from trimtab.errors import ResourceError, TrimtabError
from trimtab.serving.store import Stamp, Store, UnknownAdapterError, folders, links, stamp


class Watch:
    """Keeps a store like a directory."""

    def __init__(self, store: Store, directory: Path) -> None:
        self.store, self.directory = store, directory
        self._seen: dict[str, Stamp] = {}
        """What the folder of each name was like at the last look; empty: gone."""
        self._settled: dict[str, Stamp] = {}
        """What it was like when it was taken over, refused, or forgotten by its name: asked no second time."""
        self._links: set[str] = set()
        """Those that were told of."""
        self._is_over = threading.Event()
        self._thread: threading.Thread | None = None

    def first_look(self) -> None:
        """Registers every folder that is there."""
        self._tell_of_links()
        for name, folder in sorted(folders(self.directory)):
            self._seen[name] = self._settled[name] = stamp(folder)
            self.store.register(name, folder)

    def look(self) -> None:
        """One look: what has settled since the last one is taken over."""
        self._tell_of_links()
        # Folders by their own names, and those that were put under another.
        served, wanted = self.store.places(), dict(folders(self.directory))
        wanted |= {name: folder for name, folder in served.items() if folder.parent == self.directory}
        for name, folder in sorted(wanted.items()):
            if self._is_over.is_set():
                return
            with self.store.directory_lock:  # for each: uploads wait for one folder, not for all
                if served.get(name, folder) == folder:
                    self._look_at(name, folder)
        for name in self._seen.keys() - wanted.keys():  # forgotten by its name before its folder went
            self._let_go(name)

    def _tell_of_links(self) -> None:
        found = links(self.directory)
        for name in sorted(found - self._links):
            self.store.say(f"{name}: is a link, and links are not followed; cp -rL LINK FOLDER makes a folder of it")
        self._links = found

    def _look_at(self, name: str, folder: Path) -> None:
        now = stamp(folder) if folder.is_dir() and not folder.is_symlink() else ()
        is_settled, self._seen[name] = self._seen.get(name) == now, now
        if is_settled and not now:
            self._let_go(name)
            self._forget(name)
        elif is_settled:
            is_known = self.store.stamp_of(name) == now  # an upload, or what was taken over
            if is_known or (self._settled.get(name) != now and self._is_taken_over(name, folder)):
                self._settled[name] = now

    def _let_go(self, name: str) -> None:
        self._seen.pop(name, None)
        self._settled.pop(name, None)

    def remove(self, name: str, *, if_generation: int | None = None) -> None:
        """Forgets a name as `Store.remove` does, until its folder changes."""
        with self.store.directory_lock:
            self.store.remove(name, if_generation=if_generation)
            self._settled[name] = stamp(self.directory / name)

    def _is_taken_over(self, name: str, folder: Path) -> bool:
        """Whether that is settled; where there was no room, the next look tries again."""
        is_new = self.store.stamp_of(name) is None
        try:
            if not is_new and self.store.status(name).state == "resident":
                self.store.say(f"{name}: replaced by {self.store.replace(name, folder).version}")
            else:
                self.store.register(name, folder)
                self.store.say(f"{name}: {'added' if is_new else 'changed; read when it is asked for'}")
        except TrimtabError as error:  # the store has said it
            return not isinstance(error, ResourceError)
        return True

    def _forget(self, name: str) -> None:
        try:
            self.store.remove(name)
            self.store.say(f"{name}: removed")
        except UnknownAdapterError:
            pass  # by HTTP, before

    def start(self, every_s: float) -> None:
        """Looks again and again, in a thread."""

        def run() -> None:
            while not self._is_over.wait(every_s):
                try:
                    self.look()
                except BaseException as error:  # what one look meets must not be the end of all looks
                    self.store.say(f"the adapter directory could not be looked through: {error}")

        self._thread = threading.Thread(target=run, name="watch", daemon=True)
        self._thread.start()

    def stop(self, timeout_s: float = 5.0) -> None:
        """Ends the thread; one that hangs on a disk is left behind."""
        self._is_over.set()
        if self._thread is not None:
            self._thread.join(timeout_s)
