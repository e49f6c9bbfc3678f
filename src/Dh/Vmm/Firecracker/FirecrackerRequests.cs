using System.Text.Json.Serialization;

namespace Dh.Vmm.Firecracker;

internal sealed record MachineConfiguration(int VcpuCount, int MemSizeMib);

internal sealed record BootSource(string KernelImagePath, string InitrdPath, string BootArgs);

internal sealed record Drive(string DriveId, string PathOnHost, bool IsRootDevice, bool IsReadOnly);

internal sealed record VsockDevice(uint GuestCid, string UdsPath);

internal sealed record BalloonDevice(int AmountMib, bool DeflateOnOom);

internal sealed record BalloonUpdate(int AmountMib);

internal sealed record EntropyDevice;

internal sealed record InstanceAction(string ActionType);

internal sealed record VmState(string State);

internal sealed record SnapshotCreateRequest(string SnapshotType, string SnapshotPath, string MemFilePath);

/// <summary>The machine of <c>--config-file</c>, in the spelling of that file.</summary>
internal sealed record MachineFile(
    [property: JsonPropertyName("boot-source")] BootSource BootSource,
    IReadOnlyList<Drive> Drives,
    [property: JsonPropertyName("machine-config")] MachineConfiguration MachineConfig);

/// <summary>What <c>GET /</c> answers.</summary>
internal sealed record InstanceInformation(string? Id, string? State, string? VmmVersion, string? AppName);

/// <summary>Both shapes of an error: the second is of requests that could not be parsed, and of too many connections.</summary>
internal sealed record ErrorAnswer(string? FaultMessage, string? Error);

[JsonSourceGenerationOptions(
    PropertyNamingPolicy = JsonKnownNamingPolicy.SnakeCaseLower, DefaultIgnoreCondition = JsonIgnoreCondition.WhenWritingNull)]
[JsonSerializable(typeof(MachineConfiguration))]
[JsonSerializable(typeof(BootSource))]
[JsonSerializable(typeof(Drive))]
[JsonSerializable(typeof(VsockDevice))]
[JsonSerializable(typeof(BalloonDevice))]
[JsonSerializable(typeof(BalloonUpdate))]
[JsonSerializable(typeof(EntropyDevice))]
[JsonSerializable(typeof(InstanceAction))]
[JsonSerializable(typeof(VmState))]
[JsonSerializable(typeof(SnapshotCreateRequest))]
[JsonSerializable(typeof(SnapshotLoadRequest))]
[JsonSerializable(typeof(MachineFile))]
[JsonSerializable(typeof(InstanceInformation))]
[JsonSerializable(typeof(ErrorAnswer))]
internal sealed partial class FirecrackerJson : JsonSerializerContext;
