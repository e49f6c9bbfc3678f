namespace Dh;

/// <summary>What kind of thing went wrong: the part of <see cref="DhException"/> that a program can act on.</summary>
public enum DhErrorReason
{
    /// <summary>The caller asked for something that makes no sense.</summary>
    Usage,

    /// <summary>A snapshot, template or file that was named does not exist.</summary>
    NotFound,

    /// <summary>A snapshot is damaged, or does not fit this host or this build.</summary>
    Snapshot,

    /// <summary>A template is wrong, or an image could not be built from it.</summary>
    Image,

    /// <summary>The VMM did not start, answered with an error, or ended.</summary>
    Vmm,

    /// <summary>The page server was refused, cheated, or could not place a page.</summary>
    PageServer,

    /// <summary>The guest broke its protocol, did not answer in time, or went away.</summary>
    Guest,

    /// <summary>This host lacks something: a program, a device, a permission, space.</summary>
    Host,
}

/// <summary>
/// An operation of this library failed. The message names the operation, the object and the next step; it does not repeat the inner exception's.
/// </summary>
public class DhException : Exception
{
    /// <summary>Makes it.</summary>
    /// <param name="reason">What kind of thing went wrong.</param>
    /// <param name="message">Operation, object, next step.</param>
    /// <param name="inner">What caused it.</param>
    public DhException(DhErrorReason reason, string message, Exception? inner = null)
        : base(message, inner) => Reason = reason;

    /// <summary>What kind of thing went wrong.</summary>
    public DhErrorReason Reason { get; }
}
