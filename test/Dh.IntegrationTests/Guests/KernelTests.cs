using System.Text;
using Dh.Images;

namespace Dh.IntegrationTests.Guests;

public sealed class KernelTests(PreparedHome prepared)
{
    [Fact]
    public async Task The_images_kernel_is_unpacked_once_whoever_asks()
    {
        var image = Image.Open(Directory.EnumerateDirectories(prepared.Home.ImagesDirectory).First(directory => !Path.GetFileName(directory).StartsWith('.')));
        var builder = new ImageBuilder(new ImageBuildOptions { ImagesDirectory = prepared.Home.ImagesDirectory, GuestDirectory = prepared.Home.ImagesDirectory });
        string vmlinux = Path.Combine(image.Directory, "vmlinux");
        File.Delete(vmlinux);

        string[] paths = await Task.WhenAll(Enumerable.Range(0, 3).Select(_ => builder.UnpackKernelAsync(image, TestContext.Current.CancellationToken)));

        Assert.Equal([vmlinux, vmlinux, vmlinux], paths);
        byte[] kernel = await File.ReadAllBytesAsync(vmlinux, TestContext.Current.CancellationToken);
        Assert.True(kernel.AsSpan().IndexOf(Encoding.ASCII.GetBytes($"Linux version {image.KernelVersion} ")) > 0, "The kernel does not name its version.");
        Assert.Equal(["image.json", "initrd", "kernel", "root.img", "vmlinux"], Directory.EnumerateFiles(image.Directory).Select(file => Path.GetFileName(file)).Order(StringComparer.Ordinal));

        var made = File.GetLastWriteTimeUtc(vmlinux);
        await builder.UnpackKernelAsync(image, TestContext.Current.CancellationToken);
        Assert.Equal(made, File.GetLastWriteTimeUtc(vmlinux));
    }
}
