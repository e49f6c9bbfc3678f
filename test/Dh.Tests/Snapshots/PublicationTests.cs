using Dh.Snapshots;
using Dh.TestSupport;

namespace Dh.Tests.Snapshots;

/// <summary>Whenever a publication ends early, one snapshot is in use, whole, and the next publication is as good as any.</summary>
public sealed class PublicationTests : IDisposable
{
    private const int MemoryMib = 1;

    private readonly TempDir _directory = new();
    private readonly SnapshotStore _store;

    public PublicationTests() => _store = new SnapshotStore(new DhHome(_directory.Path));

    private string Entry => Path.Combine(_directory.Path, "vm/snapshots/python-3.11");

    [Fact]
    public async Task It_may_end_after_every_step()
    {
        var (draft, manifest) = Draft("first");
        _store.Publish(draft, manifest);
        int steps = _store.PublicationSteps(draft, manifest).Count();
        for (int done = 0; done <= steps; done++)
        {
            string old = _store.Open("python", "3.11").Manifest.Id;
            (draft, manifest) = Draft($"next-{done}");
            foreach (var step in _store.PublicationSteps(draft, manifest).Take(done))
            {
                step();
            }

            var current = _store.Open("python", "3.11");
            Assert.Contains(current.Manifest.Id, (string[])[old, manifest.Id]);
            Assert.Equal(done >= 6, current.Manifest.Id == manifest.Id); // from the second rename on
            await current.VerifyAsync(TestContext.Current.CancellationToken);
            Assert.Equal(current.Manifest.Id, Assert.Single(_store.List(out var damaged)).Manifest.Id);
            Assert.Empty(damaged);

            // As each preparation begins.
            _store.RemoveDeadDrafts();
            (draft, manifest) = Draft($"after-{done}");
            await _store.Publish(draft, manifest).VerifyAsync(TestContext.Current.CancellationToken);
            Assert.Equal(["current", manifest.Id], Directory.EnumerateFileSystemEntries(Entry).Select(Path.GetFileName).OrderByDescending(name => name));
            Assert.Equal(Entry, Assert.Single(Directory.EnumerateFileSystemEntries(Path.GetDirectoryName(Entry)!)));
        }
    }

    public void Dispose() => _directory.Dispose();

    private (string Draft, SnapshotManifest Manifest) Draft(string id)
    {
        string draft = _store.CreateDraft(id);
        return (draft, WrittenSnapshot.Write(draft, compressed: false, MemoryMib << 20, MemoryMib, id: id));
    }
}
