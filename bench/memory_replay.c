// A guest as far as its memory goes: brings the memory of a snapshot back in one of several ways, then touches the pages that a real guest
// was seen to touch, in that guest's order, and times each of them. A process of its own, because managed code must not touch memory that
// is registered with a userfaultfd.
//
//   memory_replay TRACE MEMORY_FILE MODE [ARGUMENT...]
//
//   uffd SOCKET_FD               a page server's client: sends Firecracker's handshake on an inherited socket
//   file                         a private mapping of the memory file
//   file-prefault RUNS           the same, before `ready`; a thread copies RUNS, as native/vmm_preload.c does it while QEMU sets up the machine
//   file-populate                the same with MAP_POPULATE: all of it is copied at once
//   memcpy RUNS                  copies into memory that is resident already
//   c-copy FILE THREADS          copies the data of FILE with UFFDIO_COPY, then unregisters: the least an eager page server has to do
//   c-prefetch FILE RUNS THREADS BLOCK  the same from a file that is mapped and read already, then as c-lazy: the least of a prefetch
//   c-lazy BLOCK                 answers every fault with the aligned block of BLOCK bytes of the memory file, on a thread
//
// TRACE is a file of 64-bit numbers: offsets of pages; bit 0 says that the page is read, bit 1 that it is written (afterwards), bit 2 that
// it is a hole. RUNS is a file of triples of 64-bit
// numbers: offset in guest memory, offset in the file (all ones: zeros, wherever they are), length. Prints `ready`, then obeys lines on its standard input:
//   map         brings back what comes back before a guest runs, prints `START END` (CLOCK_MONOTONIC, nanoseconds; uffd: of the sending)
//   replay N    touches the next N pages of the trace, prints `START END SLOW P50 P99 MAX PRIVATE`: of the accesses to data slower than
//               2 us the number and the nanoseconds that they took, and the bytes of memory that are its own: anonymous ones that were added since `ready`
// End of file ends it. The handlers in here trust their peer, handle no event but faults and no refusal: a lower bound, no page server.
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/userfaultfd.h>
#include <poll.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#define PAGE 4096UL
#define PIECE (4UL << 20)
#define SLOW_NS 2000
#define ZEROS UINT64_MAX

enum { READ = 1, WRITTEN = 2, HOLE = 4 };

struct run {
    uint64_t to, from, length;
};

static char *memory, *source, *packed;
static char zeros[PIECE];
static size_t length, touched, trace_length, run_count;
static uint64_t *trace, block;
static uint32_t *latencies;
static struct run *runs;
static atomic_size_t next_piece;
static struct run *pieces;
static size_t piece_count;
static int uffd;

static void die(const char *what)
{
    perror(what);
    exit(1);
}

static int64_t now(void)
{
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return time.tv_sec * 1000000000L + time.tv_nsec;
}

static void *read_all(const char *path, size_t unit, size_t *count)
{
    struct stat status;
    int file = open(path, O_RDONLY | O_CLOEXEC);
    if (file < 0 || fstat(file, &status) != 0)
        die(path);
    char *bytes = malloc(status.st_size + 1);
    if (bytes == NULL || read(file, bytes, status.st_size) != status.st_size)
        die(path);
    close(file);
    *count = status.st_size / unit;
    return bytes;
}

static char *map_file(const char *path, int prot, int flags)
{
    struct stat status;
    int file = open(path, O_RDONLY | O_CLOEXEC);
    if (file < 0 || fstat(file, &status) != 0)
        die(path);
    char *address = mmap(NULL, status.st_size, prot, flags, file, 0);
    if (address == MAP_FAILED)
        die("mmap");
    close(file);
    return address;
}

// The stretches of a file that hold data.
static void find_runs(const char *path)
{
    size_t room = 0;
    int file = open(path, O_RDONLY | O_CLOEXEC);
    if (file < 0)
        die(path);
    for (off_t end = 0, at; (at = lseek(file, end, SEEK_DATA)) >= 0; run_count++) {
        end = lseek(file, at, SEEK_HOLE);
        if (run_count == room)
            runs = realloc(runs, (room = 2 * room + 1024) * sizeof *runs);
        runs[run_count] = (struct run){ at, at, end - at };
    }
    close(file);
}

static void map_anonymous(int flags)
{
    memory = mmap(NULL, length, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | flags, -1, 0);
    if (memory == MAP_FAILED)
        die("mmap");
}

// Registers what is mapped with a userfaultfd.
static void register_memory(void)
{
    int device = open("/dev/userfaultfd", O_RDWR | O_CLOEXEC);
    uffd = ioctl(device, USERFAULTFD_IOC_NEW, O_CLOEXEC | O_NONBLOCK);
    struct uffdio_api api = { .api = UFFD_API, .features = UFFD_FEATURE_EVENT_REMOVE };
    struct uffdio_register range = { .range = { (uintptr_t)memory, length }, .mode = UFFDIO_REGISTER_MODE_MISSING };
    if (device < 0 || uffd < 0 || ioctl(uffd, UFFDIO_API, &api) != 0 || ioctl(uffd, UFFDIO_REGISTER, &range) != 0)
        die("userfaultfd");
    close(device);
}

static void send_handshake(int sock)
{
    char json[160];
    int size = snprintf(json, sizeof json, "[{\"base_host_virt_addr\":%lu,\"size\":%zu,\"offset\":0,\"page_size\":4096,\"page_size_kib\":4096}]",
                        (unsigned long)memory, length);
    union {
        struct cmsghdr header;
        char bytes[CMSG_SPACE(sizeof uffd)];
    } rights = { .header = { .cmsg_len = CMSG_LEN(sizeof uffd), .cmsg_level = SOL_SOCKET, .cmsg_type = SCM_RIGHTS } };
    memcpy(CMSG_DATA(&rights.header), &uffd, sizeof uffd);
    struct msghdr message = {
        .msg_iov = &(struct iovec){ json, (size_t)size },
        .msg_iovlen = 1,
        .msg_control = &rights,
        .msg_controllen = sizeof rights,
    };
    if (sendmsg(sock, &message, MSG_NOSIGNAL) != size)
        die("sendmsg");
    close(uffd);
}

static void copy_in(uint64_t to, const char *from, uint64_t size)
{
    for (uint64_t done = 0; done < size;) {
        struct uffdio_copy copy = { .dst = (uintptr_t)memory + to + done, .src = (uintptr_t)from + done, .len = size - done };
        if (ioctl(uffd, UFFDIO_COPY, &copy) != 0 && copy.copy <= 0 && copy.copy != -EEXIST)
            die("UFFDIO_COPY");
        done += copy.copy == -EEXIST ? PAGE : (uint64_t)copy.copy;
    }
}

static void *copy_pieces(void *unused)
{
    (void)unused;
    for (size_t i; (i = atomic_fetch_add(&next_piece, 1)) < piece_count;)
        copy_in(pieces[i].to, pieces[i].from == ZEROS ? zeros : packed + pieces[i].from, pieces[i].length);
    return NULL;
}

static void copy_runs(int threads)
{
    for (size_t i = 0; i < run_count; i++)
        piece_count += (runs[i].length + PIECE - 1) / PIECE;
    pieces = malloc(piece_count * sizeof *pieces);
    size_t count = 0;
    for (size_t i = 0; i < run_count; i++)
        for (uint64_t at = 0; at < runs[i].length; at += PIECE)
            pieces[count++] = (struct run){ runs[i].to + at, runs[i].from == ZEROS ? ZEROS : runs[i].from + at, runs[i].length - at < PIECE ? runs[i].length - at : PIECE };
    pthread_t others[64];
    for (int i = 1; i < threads; i++)
        pthread_create(&others[i], NULL, copy_pieces, NULL);
    copy_pieces(NULL);
    for (int i = 1; i < threads; i++)
        pthread_join(others[i], NULL);
}

static void *answer_faults(void *unused)
{
    (void)unused;
    struct pollfd event = { uffd, POLLIN, 0 };
    struct uffd_msg message;
    while (poll(&event, 1, -1) >= 0)
        if (read(uffd, &message, sizeof message) == sizeof message && message.event == UFFD_EVENT_PAGEFAULT) {
            uint64_t to = (message.arg.pagefault.address - (uintptr_t)memory) & ~(block - 1);
            copy_in(to, source + to, length - to < block ? length - to : block);
        }
    return NULL;
}

static void *prefault_runs(void *unused)
{
    (void)unused;
    for (size_t i = 0; i < run_count; i++)
        if (madvise(memory + runs[i].to, runs[i].length, MADV_POPULATE_WRITE) != 0)
            die("MADV_POPULATE_WRITE");
    return NULL;
}

static void begin_prefault(void)
{
    pthread_t thread;
    if (pthread_create(&thread, NULL, prefault_runs, NULL) != 0)
        die("pthread_create");
    pthread_detach(thread);
}

static void serve(const char *file, const char *block_size)
{
    pthread_t thread;
    block = strtoull(block_size, NULL, 10);
    source = map_file(file, PROT_READ, MAP_SHARED);
    pthread_create(&thread, NULL, answer_faults, NULL);
}

// What has to be there before the clock starts.
static void prepare(char **arguments)
{
    const char *mode = arguments[1];
    if (strcmp(mode, "memcpy") == 0)
        map_anonymous(MAP_POPULATE);
    else if (strncmp(mode, "file", 4) != 0)
        map_anonymous(0);
    if (strcmp(mode, "memcpy") != 0 && strncmp(mode, "file", 4) != 0)
        register_memory();
    if (strcmp(mode, "memcpy") == 0 || strcmp(mode, "file-prefault") == 0)
        runs = read_all(arguments[2], sizeof *runs, &run_count);
    if (strcmp(mode, "file-prefault") == 0)
        memory = map_file(arguments[0], PROT_READ | PROT_WRITE, MAP_PRIVATE);
    if (strcmp(mode, "c-prefetch") == 0)
        runs = read_all(arguments[3], sizeof *runs, &run_count);
    if (strcmp(mode, "c-prefetch") == 0)
        packed = map_file(arguments[2], PROT_READ, MAP_SHARED | MAP_POPULATE);
}

// arguments: the memory file, the mode, the mode's own.
static void map(char **arguments)
{
    const char *mode = arguments[1];
    if (strcmp(mode, "uffd") == 0) {
        send_handshake(atoi(arguments[2]));
    } else if (strcmp(mode, "file") == 0) {
        memory = map_file(arguments[0], PROT_READ | PROT_WRITE, MAP_PRIVATE);
    } else if (strcmp(mode, "file-prefault") == 0) {
        // mapped already, and a thread copies
    } else if (strcmp(mode, "file-populate") == 0) {
        memory = map_file(arguments[0], PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_POPULATE);
    } else if (strcmp(mode, "memcpy") == 0) {
        source = map_file(arguments[0], PROT_READ, MAP_SHARED);
        for (size_t i = 0; i < run_count; i++)
            memcpy(memory + runs[i].to, source + runs[i].from, runs[i].length);
    } else if (strcmp(mode, "c-copy") == 0) {
        packed = map_file(arguments[2], PROT_READ, MAP_SHARED);
        find_runs(arguments[2]);
        copy_runs(atoi(arguments[3]));
        struct uffdio_range range = { (uintptr_t)memory, length };
        if (ioctl(uffd, UFFDIO_UNREGISTER, &range) != 0)
            die("UFFDIO_UNREGISTER");
    } else if (strcmp(mode, "c-prefetch") == 0) {
        copy_runs(atoi(arguments[4]));
        serve(arguments[0], arguments[5]);
    } else if (strcmp(mode, "c-lazy") == 0) {
        serve(arguments[0], arguments[2]);
    } else {
        exit(2);
    }
}

static long own_bytes(void)
{
    char line[256];
    long kib = 0;
    FILE *file = fopen("/proc/self/smaps_rollup", "re");
    while (file != NULL && fgets(line, sizeof line, file) != NULL)
        if (sscanf(line, "Anonymous: %ld", &kib) == 1)
            break;
    if (file == NULL)
        die("smaps_rollup");
    fclose(file);
    return kib << 10;
}

static int compare(const void *left, const void *right)
{
    uint32_t l = *(const uint32_t *)left, r = *(const uint32_t *)right;
    return (l > r) - (l < r);
}

static void replay(size_t count, long before)
{
    size_t slow = 0;
    int64_t start = now(), last = start;
    for (size_t end = touched + count; touched < end && touched < trace_length; touched++) {
        volatile uint64_t *word = (volatile uint64_t *)(memory + (trace[touched] & ~(PAGE - 1)));
        if (trace[touched] & READ)
            (void)*word;
        if (trace[touched] & WRITTEN)
            *word = 1;
        int64_t time = now();
        if (time - last > SLOW_NS && !(trace[touched] & HOLE))
            latencies[slow++] = time - last;
        last = time;
    }
    long added = own_bytes() - before;
    qsort(latencies, slow, sizeof *latencies, compare);
    printf("%ld %ld %zu %u %u %u %ld\n", start, last, slow, slow ? latencies[slow / 2] : 0, slow ? latencies[slow * 99 / 100] : 0,
           slow ? latencies[slow - 1] : 0, added);
}

int main(int argc, char **argv)
{
    char line[64];
    struct stat status;
    setvbuf(stdout, NULL, _IOLBF, BUFSIZ);
    if (argc < 4 || stat(argv[2], &status) != 0)
        return 2;
    length = status.st_size;
    trace = read_all(argv[1], sizeof *trace, &trace_length);
    latencies = malloc((trace_length + 1) * sizeof *latencies);
    memset(latencies, 1, (trace_length + 1) * sizeof *latencies); // resident: its own faults are not the guest's
    prepare(argv + 2);
    long before = strcmp(argv[3], "memcpy") == 0 ? 0 : own_bytes();
    if (strcmp(argv[3], "file-prefault") == 0)
        begin_prefault();
    printf("ready\n");
    while (fgets(line, sizeof line, stdin) != NULL) {
        int64_t start = now();
        if (strcmp(line, "map\n") == 0) {
            map(argv + 2);
            printf("%ld %ld\n", start, now());
        } else {
            replay(strtoull(line + strlen("replay "), NULL, 10), before);
        }
    }
    return 0;
}
