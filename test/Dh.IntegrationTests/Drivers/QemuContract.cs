using Dh.IntegrationTests.Guests;
using Dh.TestSupport;

namespace Dh.IntegrationTests.Drivers;

/// <summary>The contract over QEMU, with a real guest.</summary>
public sealed class QemuContract(PreparedHome prepared) : DriverContract, IDisposable
{
    private readonly OwnHome _own = new(prepared);

    protected override DhProgram Dh => _own.Dh;

    protected override string VmmName => "qemu-system";

    public void Dispose() => _own.Dispose();
}
