namespace Dh.Images;

/// <summary>Where an image is built, and from what beside its template.</summary>
public sealed class ImageBuildOptions
{
    /// <summary>Where images are kept: <c>$DH_HOME/vm/images</c>. It is made when it is missing.</summary>
    /// <exception cref="ArgumentException">Set to a path with a double quote or a line break, which apt's configuration cannot express.</exception>
    public required string ImagesDirectory
    {
        get;
        init
        {
            ArgumentException.ThrowIfNullOrEmpty(value);
            field = value.AsSpan().ContainsAny('"', '\n', '\r')
                ? throw new ArgumentException("The path holds a double quote or a line break.", nameof(value))
                : Path.GetFullPath(value);
        }
    }

    /// <summary>The guest's files: <c>init</c> (a static ELF file) and <c>*.py</c>.</summary>
    public required string GuestDirectory
    {
        get;
        init
        {
            ArgumentException.ThrowIfNullOrEmpty(value);
            field = Path.GetFullPath(value);
        }
    }

    /// <summary>A directory of wheels that is the only source of Python packages; null: the index that the user's pip is configured for.</summary>
    public string? Wheelhouse { get; init => field = value is null ? null : Path.GetFullPath(value); }

    /// <summary>Python requirements beside the template's, in pip's notation.</summary>
    public IReadOnlyList<string> ExtraRequirements { get; init; } = [];

    /// <summary>The URI of a Debian archive; null: the ones that this host's apt is configured with.</summary>
    public string? Mirror { get; init; }
}
