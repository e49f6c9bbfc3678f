namespace Dh.Pool;

/// <summary>Makes the machines of a pool.</summary>
internal interface IPoolMachines
{
    /// <summary>What one more machine takes of this host's memory, in bytes: as much as the largest so far, or an estimate before the first.</summary>
    long BytesPerMachine { get; }

    /// <summary>Restores a machine, whose guest has become its own.</summary>
    /// <param name="cancellationToken">Gives up; nothing is left then.</param>
    /// <exception cref="DhException">It could not be restored; nothing is left.</exception>
    Task<IPoolMachine> RestoreAsync(CancellationToken cancellationToken);
}

/// <summary>A machine of a pool, for its owner alone. Disposing it ends it, and waits until nothing is left.</summary>
internal interface IPoolMachine : IAsyncDisposable
{
    /// <summary>Completes when it has ended by itself; never fails.</summary>
    Task Ended { get; }

    /// <summary>Runs code that does nothing through the whole path of a run, and leaves nothing behind in the guest.</summary>
    /// <param name="cancellationToken">Gives up.</param>
    /// <exception cref="DhException">It did not run as it should.</exception>
    Task WarmUpAsync(CancellationToken cancellationToken);

    /// <summary>Lets it have only the processor time that nothing else wants, or its share again. Never fails, and takes no time worth mentioning.</summary>
    /// <param name="isGivingWay">Whether it gives way.</param>
    void GiveWay(bool isGivingWay);
}
