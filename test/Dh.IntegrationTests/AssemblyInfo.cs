// The tests count descriptors and measure times of this process, and each of them keeps the cores busy.
[assembly: CollectionBehavior(DisableTestParallelization = true)]
