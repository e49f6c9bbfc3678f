using System.Diagnostics;
using System.Globalization;
using System.Reflection;
using System.Runtime.InteropServices;
using Dh.Linux;
using Dh.Linux.Abi;
using Dh.TestSupport;

namespace Dh.Tests;

public sealed class AbiTests
{
    [Fact(Timeout = 60_000)]
    public async Task Every_number_size_and_offset_equals_that_of_the_C_headers()
    {
        var native = await NativeLinesAsync(TestContext.Current.CancellationToken);

        Assert.Equal(native.Order(StringComparer.Ordinal), ManagedLines().Order(StringComparer.Ordinal));
    }

    [Fact]
    public void The_ioctl_numbers_follow_from_the_sizes_of_their_structs()
    {
        Assert.Equal(Constants.UFFDIO_API, ReadWrite(0x3f, Marshal.SizeOf<UffdioApi>()));
        Assert.Equal(Constants.UFFDIO_REGISTER, ReadWrite(0x00, Marshal.SizeOf<UffdioRegister>()));
        Assert.Equal(Constants.UFFDIO_UNREGISTER, Read(0x01, Marshal.SizeOf<UffdioRange>()));
        Assert.Equal(Constants.UFFDIO_WAKE, Read(0x02, Marshal.SizeOf<UffdioRange>()));
        Assert.Equal(Constants.UFFDIO_COPY, ReadWrite(0x03, Marshal.SizeOf<UffdioCopy>()));
        Assert.Equal(Constants.UFFDIO_ZEROPAGE, ReadWrite(0x04, Marshal.SizeOf<UffdioZeroPage>()));

        // asm-generic/ioctl.h: direction (read 2, write 1), size, type 0xAA, number.
        static uint ReadWrite(uint number, int size) => (3u << 30) | ((uint)size << 16) | (0xAAu << 8) | number;
        static uint Read(uint number, int size) => (2u << 30) | ((uint)size << 16) | (0xAAu << 8) | number;
    }

    private static IEnumerable<string> ManagedLines()
    {
        foreach (var constant in typeof(Constants).GetFields(BindingFlags.Public | BindingFlags.Static))
        {
            yield return Line(constant.Name, Convert.ToUInt64(constant.GetRawConstantValue(), CultureInfo.InvariantCulture));
        }

        foreach (var type in typeof(Constants).Assembly.GetTypes().Where(type => type is { IsValueType: true, Namespace: "Dh.Linux.Abi" }))
        {
            yield return Line(type.Name, (ulong)Marshal.SizeOf(type));
            foreach (var field in type.GetFields(BindingFlags.Public | BindingFlags.Instance))
            {
                yield return Line($"{type.Name}.{field.Name}.offset", (ulong)Marshal.OffsetOf(type, field.Name));
                yield return Line($"{type.Name}.{field.Name}.size", field.FieldType.IsPointer ? (ulong)nint.Size : (ulong)Marshal.SizeOf(field.FieldType));
            }
        }

        yield return Line("ChildProcess.FileActionsSize", ChildProcess.FileActionsSize);
        yield return Line("ChildProcess.AttributesSize", ChildProcess.AttributesSize);
        yield return Line("ChildProcess.SignalSetSize", ChildProcess.SignalSetSize);
        yield return Line("siginfo_t", 128);
        yield return Line("UnixSockets.MaxPathLength", UnixSockets.MaxPathLength);
    }

    private static string Line(string name, ulong value) => string.Create(CultureInfo.InvariantCulture, $"{name} {value}");

    private static async Task<string[]> NativeLinesAsync(CancellationToken cancellationToken)
    {
        using var directory = new TempDir();
        string program = directory["abi_check"];
        _ = await RunAsync("gcc", cancellationToken, "-D_GNU_SOURCE", "-Wall", "-Wextra", "-Werror", "-o", program, Repository.PathOf("test/abi-check/abi_check.c"));
        return (await RunAsync(program, cancellationToken)).Split('\n', StringSplitOptions.RemoveEmptyEntries);
    }

    private static async Task<string> RunAsync(string program, CancellationToken cancellationToken, params string[] arguments)
    {
        using var process = Process.Start(new ProcessStartInfo(program, arguments) { RedirectStandardOutput = true, RedirectStandardError = true })!;
        var error = process.StandardError.ReadToEndAsync(cancellationToken);
        string output = await process.StandardOutput.ReadToEndAsync(cancellationToken);
        await process.WaitForExitAsync(cancellationToken);
        Assert.True(process.ExitCode == 0, await error);
        return output;
    }
}
