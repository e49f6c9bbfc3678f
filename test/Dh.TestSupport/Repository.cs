namespace Dh.TestSupport;

/// <summary>The source tree that the running tests were built from.</summary>
public static class Repository
{
    /// <summary>The directory that holds Dh.slnx.</summary>
    public static string Root { get; } = FindRoot();

    /// <summary>A path in the tree.</summary>
    public static string PathOf(string relative) => Path.Combine(Root, relative);

    private static string FindRoot()
    {
        for (var at = new DirectoryInfo(AppContext.BaseDirectory); at is not null; at = at.Parent)
        {
            if (File.Exists(Path.Combine(at.FullName, "Dh.slnx")))
            {
                return at.FullName;
            }
        }

        throw new InvalidOperationException($"No Dh.slnx above {AppContext.BaseDirectory}: run the tests from a build inside the source tree.");
    }
}
