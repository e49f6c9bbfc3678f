// Guest memory, the two files of a snapshot, and the virtual CPU that reads and writes the memory.
//
// The state file: what a machine needs besides its memory, one hash per page of the memory, and a CRC-64 of all that. With the hashes the
// virtual CPU can tell whether every page came back as it was, whoever brought it.
#include "fake.h"
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <pthread.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <sys/syscall.h>

enum { MAX_REGIONS = 8 };
#define HUGE_PAGE (2UL << 20)

struct state_header {
    char magic[8];
    char format[16]; // the snapshot version
    uint64_t memory_bytes;
    uint64_t huge;
    struct saved_devices devices;
};

bool restored;
static struct region regions[MAX_REGIONS];
static int region_count;
static size_t total;
static bool huge;
static uint64_t *hashes; // one for each page; of the moment of the snapshot, and of what was written since
static int uffd = -1, handshake = -1;
static pthread_mutex_t may_run = PTHREAD_MUTEX_INITIALIZER;

static size_t page_size(void) { return huge ? HUGE_PAGE : PAGE; }

static unsigned char *at_offset(size_t offset)
{
    for (int i = 0; i < region_count; i++)
        if (offset >= regions[i].offset && offset < regions[i].offset + regions[i].size)
            return regions[i].base + (offset - regions[i].offset);
    errno = EFAULT;
    broken("an offset outside of guest memory");
}

// Regions in guest-physical order; the kernel places mappings downwards, so the second lies below the first, as in Firecracker.
static const char *map_regions(int file)
{
    static char failure[160];
    const char *split = scripted("split");
    size_t at = 0;
    for (region_count = 0; at < total; region_count++) {
        char *end = NULL;
        size_t size = split && region_count < MAX_REGIONS - 1 ? strtoull(split, &end, 10) << 20 : 0;
        split = end && end != split ? end : NULL;
        if (size == 0 || at + size > total)
            size = total - at;
        int flags = MAP_PRIVATE | (file < 0 ? MAP_ANONYMOUS : 0) | (huge && file < 0 ? MAP_HUGETLB : MAP_NORESERVE);
        void *base = mmap(NULL, size, PROT_READ | PROT_WRITE, flags, file, file < 0 ? 0 : (off_t)at);
        if (base == MAP_FAILED) {
            snprintf(failure, sizeof failure, "Cannot create mmap region: %s", os_error(errno));
            return failure;
        }
        regions[region_count] = (struct region){ base, size, at };
        at += size;
    }
    return NULL;
}

// ---- a booted machine

// What a booted guest's memory holds: data and holes of 37 pages, always the same.
static void fill(void)
{
    for (size_t page = 0; page < total / PAGE; page++) {
        uint64_t word = (page / 37 + 1) * 0x9e3779b97f4a7c15UL;
        if ((word >> 33) % 4 != 0)
            continue;
        uint64_t *words = (uint64_t *)at_offset(page * PAGE);
        word ^= page;
        for (size_t w = 0; w < PAGE / 8; w++)
            words[w] = word ^= word << 13, word ^= word >> 7, word ^= word << 17;
    }
}

void memory_boot(size_t mib, bool with_huge_pages)
{
    total = mib << 20;
    huge = with_huge_pages;
    hashes = calloc(total / PAGE, sizeof *hashes);
    const char *failure = map_regions(-1);
    if (failure || !hashes)
        broken(failure);
    fill();
    for (size_t page = 0; page < total / PAGE; page++)
        hashes[page] = hash_words(FNV_START, at_offset(page * PAGE));
}

// ---- the files of a snapshot

// CRC-64 with Jones's polynomial, reflected; the one that Firecracker's state files end with.
static uint64_t crc64(uint64_t crc, const void *bytes, size_t length)
{
    static uint64_t table[256];
    if (!table[1]) {
        for (unsigned i = 0; i < 256; i++) {
            table[i] = i;
            for (int bit = 0; bit < 8; bit++)
                table[i] = (table[i] >> 1) ^ (table[i] & 1 ? 0x95ac9329ac4bc9b5UL : 0);
        }
    }
    for (const unsigned char *at = bytes; length > 0; length--)
        crc = table[(crc ^ *at++) & 0xff] ^ (crc >> 8);
    return crc;
}

static bool write_all(int file, const void *bytes, size_t length)
{
    while (length > 0) {
        ssize_t count = write(file, bytes, length);
        if (count < 0)
            return false;
        bytes = (const char *)bytes + count, length -= count;
    }
    return true;
}

static bool write_memory(int file, bool full)
{
    static const char zero[PAGE];
    if (ftruncate(file, total) != 0)
        return false;
    for (size_t offset = 0; offset < total; offset += PAGE) {
        const void *page = at_offset(offset);
        hashes[offset / PAGE] = hash_words(FNV_START, page);
        if ((full || memcmp(page, zero, PAGE) != 0) && pwrite(file, page, PAGE, offset) != PAGE)
            return false;
    }
    return true;
}

const char *memory_save(const char *state_path, const char *memory_path, bool full, const struct saved_devices *devices)
{
    static char failure[256];
    int file = open(memory_path, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0644);
    if (file < 0 || !write_memory(file, full)) {
        snprintf(failure, sizeof failure, "Cannot write memory file: Memory error: Cannot perform %s on the memory backing file: %s", file < 0 ? "open" : "dump", os_error(errno));
        return failure;
    }
    close(file);
    struct state_header header = { .magic = "FAKEFC", .memory_bytes = total, .huge = huge, .devices = *devices };
    snprintf(header.format, sizeof header.format, "%s", snapshot_version);
    uint64_t crc = crc64(crc64(0, &header, sizeof header), hashes, total / PAGE * sizeof *hashes);
    file = open(state_path, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0644);
    if (file < 0 || !write_all(file, &header, sizeof header) || !write_all(file, hashes, total / PAGE * sizeof *hashes) || !write_all(file, &crc, sizeof crc)) {
        snprintf(failure, sizeof failure, "Cannot perform open on the snapshot backing file: %s", os_error(errno));
        return failure;
    }
    close(file);
    return NULL;
}

const char *memory_load_state(const char *state_path, struct saved_devices *devices)
{
    static char failure[256];
    struct stat status;
    int file = open(state_path, O_RDONLY | O_CLOEXEC);
    if (file < 0 || fstat(file, &status) != 0) {
        snprintf(failure, sizeof failure, "Failed to get snapshot state from file: Failed to open snapshot file: %s", os_error(errno));
        return failure;
    }
    if (status.st_size < (off_t)sizeof(uint64_t))
        return "Failed to get snapshot state from file: Failed to load snapshot state from file: IO Error: File too short to contain CRC";
    char *bytes = mmap(NULL, status.st_size, PROT_READ, MAP_PRIVATE, file, 0);
    if (bytes == MAP_FAILED)
        broken("mmap state");
    close(file);
    size_t length = status.st_size - sizeof(uint64_t);
    uint64_t crc;
    memcpy(&crc, bytes + length, sizeof crc);
    if (crc != crc64(0, bytes, length))
        return "Failed to get snapshot state from file: Failed to load snapshot state from file: CRC64 validation failed";
    const struct state_header *header = (const void *)bytes;
    if (length < sizeof *header || memcmp(header->magic, "FAKEFC", 7) != 0 || strcmp(header->format, snapshot_version) != 0)
        return "Failed to get snapshot state from file: Failed to load snapshot state from file: bitcode error";
    total = header->memory_bytes;
    huge = header->huge;
    *devices = header->devices;
    hashes = malloc(length - sizeof *header);
    if (!hashes || length - sizeof *header != total / PAGE * sizeof *hashes)
        broken("state file");
    memcpy(hashes, bytes + sizeof *header, length - sizeof *header);
    munmap(bytes, status.st_size);
    return NULL;
}

// ---- the two memory backends

const char *memory_map_file(const char *memory_path)
{
    static char failure[256];
    struct stat status;
    int file = open(memory_path, O_RDONLY | O_CLOEXEC);
    if (file < 0 || fstat(file, &status) != 0) {
        snprintf(failure, sizeof failure, "Failed to load guest memory: Error creating guest memory from file: Failed to load guest memory: %s", os_error(errno));
        return failure;
    }
    if (status.st_size < (off_t)total)
        return "Failed to load guest memory: Error creating guest memory from file: Failed to restore guest memory: Total sum of memory regions exceeds largest possible file offset";
    const char *unmapped = map_regions(file);
    if (unmapped)
        broken(unmapped);
    close(file);
    return NULL;
}

static size_t write_handshake(char *text, size_t size)
{
    size_t at = 0;
    for (int i = 0; i < region_count; i++) {
        at += snprintf(text + at, size - at, "%s{\"base_host_virt_addr\":%" PRIuPTR ",\"size\":%zu,\"offset\":%zu,",
            i == 0 ? "[" : ",", (uintptr_t)regions[i].base, regions[i].size, regions[i].offset);
        if (version >= 11200)
            at += snprintf(text + at, size - at, "\"page_size\":%zu,", page_size());
        at += snprintf(text + at, size - at, "\"page_size_kib\":%zu}", page_size());
    }
    return at + snprintf(text + at, size - at, "]");
}

const char *memory_connect(const char *socket_path)
{
    static char failure[256];
    const char *what, *unmapped = map_regions(-1);
    if (unmapped) {
        snprintf(failure, sizeof failure, "Failed to load guest memory: Error creating guest memory from uffd: Failed to restore guest memory: %s", unmapped);
        return failure;
    }
    uffd = make_userfaultfd(regions, region_count, false, &what);
    if (uffd < 0) {
        snprintf(failure, sizeof failure, "Failed to load guest memory: Error creating guest memory from uffd: Failed to UFFD object: %s: %s", what, os_error(errno));
        return failure;
    }
    struct sockaddr_un address;
    handshake = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (!socket_address(&address, socket_path))
        return "Failed to load guest memory: Error creating guest memory from uffd: Failed to connect to UDS Unix stream: path must be shorter than SUN_LEN";
    if (handshake < 0 || connect(handshake, (struct sockaddr *)&address, sizeof address) != 0) {
        snprintf(failure, sizeof failure, "Failed to load guest memory: Error creating guest memory from uffd: Failed to connect to UDS Unix stream: %s", os_error(errno));
        return failure;
    }
    char text[2048];
    size_t length = write_handshake(text, sizeof text);
    note("handshake %s", text);
    if (send_with_descriptors(handshake, text, length, &uffd, 1) != (ssize_t)length) {
        snprintf(failure, sizeof failure, "Failed to load guest memory: Error creating guest memory from uffd: Failed to send file descriptor: %s", os_error(errno));
        return failure;
    }
    return NULL;
}

void memory_touch_queues(void)
{
    // The first and the last page with data: no page server has both of them in place at once.
    uint64_t zero = hash_words(FNV_START, (const char[PAGE]){ 0 });
    size_t first = 0, last = total / PAGE - 1;
    while (first < last && hashes[first] == zero)
        first++;
    while (last > first && hashes[last] == zero)
        last--;
    (void)*(volatile unsigned char *)at_offset(first * PAGE);
    step("populating");
    (void)*(volatile unsigned char *)at_offset(last * PAGE);
    note("queues restored");
}

void memory_end_load(void)
{
    restored = true;
    // Since 1.12 the connection stays open as long as the process lives; before, it was closed here.
    if (version < 11200 && handshake >= 0)
        close(handshake);
}

// Gives back the end of guest memory in stretches as Firecracker does, on the thread that calls.
void memory_inflate_balloon(size_t mib)
{
    size_t stretch = 4UL << 20, begin = mib << 20 > total ? 0 : total - (mib << 20);
    uint64_t zero = hash_words(FNV_START, (const char[PAGE]){ 0 });
    for (int i = 0; i < region_count; i++) {
        for (size_t at = 0; at < regions[i].size; at += stretch) {
            size_t offset = regions[i].offset + at, length = at + stretch > regions[i].size ? regions[i].size - at : stretch;
            if (offset < begin)
                continue;
            // A private mapping of a file would show the file again: Firecracker maps fresh memory over it.
            if (handshake < 0 && restored
                    ? mmap(regions[i].base + at, length, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED | MAP_NORESERVE, -1, 0) == MAP_FAILED
                    : madvise(regions[i].base + at, length, MADV_DONTNEED) != 0)
                broken("balloon");
            for (size_t page = offset / PAGE; page < (offset + length) / PAGE; page++)
                hashes[page] = zero;
        }
    }
}

// ---- the virtual CPU

// Counts the pages that are not what they were, and says what the first of them holds.
static size_t check(size_t offset, size_t length, char *first, size_t size)
{
    uint64_t zero = hash_words(FNV_START, (const char[PAGE]){ 0 });
    size_t differing = 0;
    for (size_t at = offset; at < offset + length; at += PAGE) {
        uint64_t hash = hash_words(FNV_START, at_offset(at));
        if (hash != hashes[at / PAGE] && differing++ == 0)
            snprintf(first, size, "at %zu %s, and %s", at, hashes[at / PAGE] == zero ? "were zeros" : "was data", hash == zero ? "are zeros" : "is other data");
    }
    return differing;
}

static void write_pages(size_t offset, size_t length)
{
    for (size_t at = offset; at < offset + length; at += PAGE) {
        __atomic_fetch_add(at_offset(at) + 8, 1, __ATOMIC_RELAXED); // the first touch is a write
        hashes[at / PAGE] = hash_words(FNV_START, at_offset(at));
    }
}

static void remove_pages(size_t offset, size_t length)
{
    uint64_t zero = hash_words(FNV_START, (const char[PAGE]){ 0 });
    for (size_t at = offset; at < offset + length; at += PAGE) {
        if (madvise(at_offset(at), PAGE, MADV_DONTNEED) != 0)
            broken("madvise");
        hashes[at / PAGE] = zero;
    }
}

static void *run_vcpu(void *unused)
{
    (void)unused;
    int guest = connect_guest();
    FILE *words = guest < 0 ? NULL : fdopen(guest, "r+e");
    if (!words)
        return NULL;
    setvbuf(words, NULL, _IONBF, 0);
    fprintf(words, "vcpu %d %s\n", getpid(), restored ? "restored" : "booted");
    char line[128];
    while (fgets(line, sizeof line, words)) {
        size_t offset = 0, length = 0;
        int number;
        pthread_mutex_lock(&may_run);
        if (sscanf(line, "check %zu %zu", &offset, &length) >= 1) {
            length = length ? length : total - offset;
            char first[96] = "";
            size_t differing = check(offset, length, first, sizeof first);
            fprintf(words, "checked %zu %zu %s\n", length / PAGE, differing, first);
        } else if (sscanf(line, "write %zu %zu", &offset, &length) == 2) {
            write_pages(offset, length);
            fprintf(words, "written %zu\n", length / PAGE);
        } else if (sscanf(line, "remove %zu %zu", &offset, &length) == 2) {
            remove_pages(offset, length);
            fprintf(words, "removed %zu\n", length / PAGE);
        } else if (sscanf(line, "die %d", &number) == 1) {
            printf("[    4.242424] Kernel panic - not syncing: the guest ends its machine\n");
            fflush(stdout);
            raise(number);
        }
        pthread_mutex_unlock(&may_run);
    }
    fclose(words);
    return NULL;
}

// As Firecracker, on all threads before the guest runs; this one allows everything.
static void filter_system_calls(void)
{
    struct sock_filter allow = BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW);
    struct sock_fprog program = {1, &allow};
    if (prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) != 0 || syscall(SYS_seccomp, SECCOMP_SET_MODE_FILTER, SECCOMP_FILTER_FLAG_TSYNC, &program) != 0)
        broken("seccomp");
}

void vcpu_start(void)
{
    pthread_t thread;
    if (pthread_create(&thread, NULL, run_vcpu, NULL) != 0)
        broken("pthread_create");
    pthread_detach(thread);
    if (!scripted("no-seccomp"))
        filter_system_calls();
}

void vcpu_pause(void) { pthread_mutex_lock(&may_run); }

void vcpu_resume(void) { pthread_mutex_unlock(&may_run); }
