namespace Dh.TestSupport;

/// <summary>Code that asks a clone for what no two clones may have in common, and for the time.</summary>
public static class CloneGenerators
{
    /// <summary>Prints one line: a value of each of <see cref="Names"/>, then the wall clock at the first instruction.</summary>
    public const string Code = """
        import time; now = time.time()
        import multiprocessing, os, random, secrets, socket, sqlite3, ssl, tempfile, uuid
        read = lambda path: open(path).read().strip()
        print(os.urandom(8).hex(), os.getrandom(8).hex(), open('/dev/urandom', 'rb').read(8).hex(), random.random(), random.Random().random(),
              random.SystemRandom().random(), secrets.token_hex(8), uuid.uuid1(), uuid.uuid1().node, uuid.uuid4(), os.path.basename(tempfile.mktemp()), ssl.RAND_bytes(8).hex(),
              multiprocessing.current_process().authkey.hex(), sqlite3.connect(':memory:').execute('select random()').fetchone()[0], socket.gethostname(), read('/etc/machine-id'), read('/proc/sys/kernel/random/boot_id'), read('/proc/sys/kernel/random/uuid'), now)
        """;

    /// <summary>What the line's values come from.</summary>
    public static IReadOnlyList<string> Names { get; } =
    [
        "os.urandom", "os.getrandom", "/dev/urandom", "random.random", "random.Random", "random.SystemRandom", "secrets", "uuid.uuid1", "uuid.uuid1's node", "uuid.uuid4", "tempfile", "ssl.RAND_bytes",
        "multiprocessing's authkey", "sqlite3", "hostname", "machine-id", "boot_id", "the kernel's uuid",
    ];

    /// <summary>Which of them have given two clones the same value, and how many more than one have it; empty as it should be.</summary>
    /// <param name="lines">What clones have printed, split at blanks.</param>
    public static IReadOnlyList<string> Alike(IReadOnlyCollection<string[]> lines) =>
        [.. Names.Select((name, value) => (Name: name, Surplus: lines.Count - lines.Select(line => line[value]).Distinct().Count()))
            .Where(found => found.Surplus > 0)
            .Select(found => $"{found.Name} ({found.Surplus})")];
}
