using System.Net.Sockets;
using Dh.Linux;
using Dh.TestSupport;
using Microsoft.Win32.SafeHandles;

namespace Dh.Tests.Linux;

public sealed class FileTests : IDisposable
{
    private readonly TempDir _directory = new();

    [Fact(Timeout = 10_000)]
    public async Task All_bytes_are_written_also_where_the_descriptor_does_not_wait()
    {
        const int Length = 4 << 20; // far more than the socket holds
        var (ours, theirs) = UnixSockets.CreateSocketPair(UnixSocketKind.Stream);
        using var reader = new NetworkStream(new Socket(theirs), ownsSocket: true);
        using var writer = ours;
        writer.Blocking = false;
        byte[] bytes = Entropy.GetBytes(Length), read = new byte[Length];
        using var descriptor = new SafeFileHandle(writer.Handle, ownsHandle: false);
        var writing = Task.Run(() => Files.WriteAll(descriptor, bytes), TestContext.Current.CancellationToken);
        await reader.ReadExactlyAsync(read, TestContext.Current.CancellationToken);
        await writing;
        Assert.Equal(bytes, read);
    }

    [Fact]
    public void At_once_is_written_what_a_pipe_takes_and_never_more()
    {
        using var reader = new System.IO.Pipes.AnonymousPipeServerStream(System.IO.Pipes.PipeDirection.In);
        using var writer = new SafeFileHandle(reader.ClientSafePipeHandle.DangerousGetHandle(), ownsHandle: false);
        byte[] bytes = new byte[1 << 20];
        Assert.Equal(5, Files.WriteAtOnce(writer, bytes.AsSpan(0, 5)));
        Assert.InRange(Files.WriteAtOnce(writer, bytes), 1, bytes.Length - 1);
        Assert.Equal(0, Files.WriteAtOnce(writer, bytes));

        reader.Dispose();
        Assert.Equal(0, Files.WriteAtOnce(writer, bytes)); // Files.WriteAll says why
    }

    [Fact]
    public void A_write_that_nobody_reads_is_EPIPE_and_a_full_device_ENOSPC()
    {
        var (ours, theirs) = UnixSockets.CreateSocketPair(UnixSocketKind.Stream);
        using var writer = ours;
        theirs.Dispose();
        using var descriptor = new SafeFileHandle(writer.Handle, ownsHandle: false);
        Assert.Equal(Errno.EPIPE, Assert.Throws<LinuxException>(() => Files.WriteAll(descriptor, "x"u8)).Errno);
        using var full = File.OpenHandle("/dev/full", FileMode.Open, FileAccess.Write);
        Assert.Equal(Errno.ENOSPC, Assert.Throws<LinuxException>(() => Files.WriteAll(full, "x"u8)).Errno);
    }

    [Fact]
    public void What_is_there_exists_and_what_cannot_be_looked_at_is_an_error()
    {
        Assert.True(Files.Exists(_directory.Path));
        Assert.False(Files.Exists(_directory["none"]));
        Assert.False(Files.Exists(Path.Combine(_directory.Write("file", ""), "below")));
        Assert.Equal("access " + new string('x', 300) + ": ENAMETOOLONG (File name too long)", Assert.Throws<LinuxException>(() => Files.Exists(new string('x', 300))).Message);
    }

    [Fact]
    public void An_exclusive_lock_keeps_all_others_out_until_it_is_given_back()
    {
        string path = _directory["lock"];
        using (var first = FileLock.TryAcquire(path))
        {
            Assert.NotNull(first);
            Assert.Null(FileLock.TryAcquire(path));
            Assert.Null(FileLock.TryAcquire(path, shared: true));
            Assert.Equal(UnixFileMode.UserRead | UnixFileMode.UserWrite, File.GetUnixFileMode(path));
        }

        using var again = FileLock.TryAcquire(path);
        Assert.NotNull(again);
    }

    [Fact]
    public void Shared_locks_go_together()
    {
        using var first = FileLock.TryAcquireDirectory(_directory.Path, shared: true);
        using var second = FileLock.TryAcquireDirectory(_directory.Path, shared: true);

        Assert.NotNull(first);
        Assert.NotNull(second);
        Assert.Null(FileLock.TryAcquireDirectory(_directory.Path));
    }

    [Fact]
    public void A_directory_that_is_gone_is_not_locked_and_nothing_is_made_in_its_place()
    {
        Assert.Equal(Errno.ENOENT, Assert.Throws<LinuxException>(() => FileLock.TryAcquireDirectory(_directory["gone"])).Errno);
        Assert.False(Path.Exists(_directory["gone"]));
    }

    [Fact]
    public void A_lock_behind_a_symbolic_link_is_refused()
    {
        File.CreateSymbolicLink(_directory["link"], _directory.Write("target", ""));

        Assert.Equal($"open {_directory["link"]}: ELOOP (Too many levels of symbolic links)",
            Assert.Throws<LinuxException>(() => FileLock.TryAcquire(_directory["link"])).Message);
    }

    [Fact(Timeout = 20_000)]
    public async Task Waiting_for_a_lock_says_so_once_and_gets_it()
    {
        string path = _directory["lock"];
        var held = FileLock.TryAcquire(path)!;
        int told = 0;
        var waiting = FileLock.AcquireAsync(path, shared: false, TimeSpan.FromSeconds(10), () => told++, TestContext.Current.CancellationToken);
        await Task.Delay(120, TestContext.Current.CancellationToken);
        Assert.False(waiting.IsCompleted);
        held.Dispose();

        using var acquired = await waiting;

        Assert.Equal(1, told);
    }

    [Fact(Timeout = 20_000)]
    public async Task Waiting_for_a_lock_is_bounded()
    {
        string path = _directory["lock"];
        using var held = FileLock.TryAcquire(path);

        var error = await Assert.ThrowsAsync<TimeoutException>(
            () => FileLock.AcquireAsync(path, shared: true, TimeSpan.FromMilliseconds(100), null, TestContext.Current.CancellationToken));

        Assert.Equal($"{path} is locked by another process and was not free within 0 s.", error.Message);
    }

    [Fact]
    public void Data_and_holes_are_told_apart()
    {
        using var file = File.OpenHandle(_directory["sparse"], FileMode.Create, FileAccess.ReadWrite);
        RandomAccess.SetLength(file, 1 << 20);
        Assert.Empty(SparseFile.GetDataExtents(file, 1 << 20));

        RandomAccess.Write(file, new byte[4096], 8192);
        RandomAccess.Write(file, new byte[8192], (1 << 20) - 8192);

        Assert.Equal([new FileExtent(8192, 4096), new FileExtent((1 << 20) - 8192, 8192)], SparseFile.GetDataExtents(file, 1 << 20));
        Assert.Equal([new FileExtent(8192, 4096)], SparseFile.GetDataExtents(file, 1 << 19));
    }

    [Fact]
    public void A_punched_hole_is_a_hole_and_the_length_stays()
    {
        using var file = File.OpenHandle(_directory["sparse"], FileMode.Create, FileAccess.ReadWrite);
        RandomAccess.Write(file, new byte[65536], 0);

        SparseFile.PunchHole(file, new FileExtent(4096, 8192));

        Assert.Equal([new FileExtent(0, 4096), new FileExtent(12288, 53248)], SparseFile.GetDataExtents(file, 65536));
        Assert.Equal(65536, RandomAccess.GetLength(file));
    }

    [Fact]
    public void Files_and_directories_are_synced_and_missing_ones_named()
    {
        Files.Sync(_directory.Write("file", "x"));
        Files.Sync(_directory.Path);

        Assert.Equal($"fsync {_directory["missing"]}: ENOENT (No such file or directory)", Assert.Throws<LinuxException>(() => Files.Sync(_directory["missing"])).Message);
    }

    [Fact]
    public void A_mapping_is_bounded_and_ends_with_its_disposal()
    {
        using var file = File.OpenHandle(_directory.Write("file", new string('x', 8192)));
        var mapping = MemoryMapping.OfFile(file, 8192);
        Assert.True(mapping.TryPopulate(4096, 4096));
        mapping.Depopulate();
        Assert.Throws<ArgumentOutOfRangeException>(() => mapping.TryPopulate(4096, 8192));
        Assert.Throws<ArgumentOutOfRangeException>(() => MemoryMapping.OfFile(file, 0));

        using var buffer = MemoryMapping.Buffer(4096);
        Assert.Throws<InvalidOperationException>(buffer.Depopulate);

        mapping.Dispose();
        mapping.Dispose();

        Assert.Throws<ObjectDisposedException>(() => mapping.Address);
    }

    public void Dispose() => _directory.Dispose();
}
