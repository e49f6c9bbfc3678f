"""Makes the JVM's random numbers unlike those of other clones.

`SecureRandom` draws on the kernel. The others have a state of their own: `Math.random()`, `ThreadLocalRandom`,
`Collections.shuffle`, the seeds of each new `Random` and `SplittableRandom`. It lies in private fields of the JVM's, which
`JVM_ARGUMENTS` open to reflection.
"""

import os
import struct

JVM_ARGUMENTS = [f"--add-opens=java.base/{package}=ALL-UNNAMED" for package in ("java.lang", "java.util", "java.util.concurrent")]

_MORE_THREADS = 256  # than there are when they are looked up
_SEED = struct.Struct("=q")


class JavaRandom:
    """Looks up before the snapshot all that `reseed` changes: a few calls into the JVM are left for the clone."""

    def __init__(self):
        import jpy

        # Field.setAccessible wants to know which class calls it, and a call by jpy is none's: by a Statement, it is that one's.
        self._class = jpy.get_type("java.lang.Class")
        self._statement = jpy.get_type("java.beans.Statement")
        self._yes = jpy.array("java.lang.Object", [jpy.get_type("java.lang.Boolean").TRUE])
        self._secure = jpy.get_type("java.security.SecureRandom")()
        self._math = self._field("java.lang.Math$RandomNumberGeneratorHolder", "randomNumberGenerator").get(None)
        self._of_shuffle = self._field("java.util.Collections", "r")
        self._seeders = [
            self._field(name, field).get(None) for name, field in (
                ("java.util.concurrent.ThreadLocalRandom", "seeder"),
                ("java.util.SplittableRandom", "defaultGen"),
                ("java.util.Random", "seedUniquifier"),
            )
        ]
        self._seed_of_thread = self._field("java.lang.Thread", "threadLocalRandomSeed")
        self._probe_of_thread = self._field("java.lang.Thread", "threadLocalRandomProbe")
        group = jpy.get_type("java.lang.Thread").currentThread().getThreadGroup()
        while group.getParent() is not None:
            group = group.getParent()
        self._root_group = group
        self._all_threads = jpy.array("java.lang.Thread", group.activeCount() + _MORE_THREADS)
        self.look_around()

    def look_around(self):
        """Finds what has come into being since. A thread that has no seed yet gets its own from a seeder, which `reseed`
        changes."""
        threads = [self._all_threads[i] for i in range(self._root_group.enumerate(self._all_threads))]
        self._threads = [thread for thread in threads if self._probe_of_thread.getInt(thread)]
        shuffle = self._of_shuffle.get(None)
        self._generators = [self._secure, self._math] if shuffle is None else [self._secure, self._math, shuffle]

    def reseed(self):
        """Changes them all. The kernel has been given fresh entropy before, and the clock been set: NativePRNG keeps what
        it has read of /dev/urandom for 100 ms."""
        count = len(self._generators) + len(self._seeders) + len(self._threads)
        seeds = (seed for seed, in _SEED.iter_unpack(os.urandom(_SEED.size * count)))
        for generator in self._generators:
            generator.setSeed(next(seeds))
        for seeder in self._seeders:
            seeder.set(next(seeds))
        for thread in self._threads:
            self._seed_of_thread.setLong(thread, next(seeds))

    def _field(self, class_name, name):
        field = self._class.forName(class_name).getDeclaredField(name)
        self._statement(field, "setAccessible", self._yes).execute()
        return field
