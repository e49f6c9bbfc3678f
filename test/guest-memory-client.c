// Plays the VMM's side of the page server's handshake, the way Firecracker does it: maps guest memory, registers it with a userfaultfd,
// sends the regions as JSON and the descriptor by SCM_RIGHTS, and keeps the socket open. A process of its own, because managed code must
// not touch memory that is registered with a userfaultfd.
//
//   guest-memory-client (fd N | path P) MODE SIZE [SPLIT]
//
// Two regions meet at the byte SPLIT of the memory file, by default in its middle. The mode `huge` takes pages of 2 MiB (hugetlbfs), `as-huge`
// takes ordinary ones and says that they are of 2 MiB. A mode that begins with [ or { is what is sent as the regions.
//
// Prints `base ADDRESS` (of the byte at offset 0), does what MODE says, prints `sent`, then obeys lines on stdin:
//   pages        prints `pages N`, then one hash per page in the order of the memory file
//   touch        writes to every page, prints `touched N`
//   discard      gives all memory back (MADV_DONTNEED) and prints `discarded N`, the number of pages that read as zeros then
//   read OFFSET LENGTH       prints `read HASH` of a stretch of whole pages
//   write OFFSET LENGTH      changes a byte of each of its pages, prints `write PAGES`
//   remove OFFSET LENGTH     gives it back (MADV_DONTNEED), prints `remove PAGES`
//   churn COUNT              gives the first page back so many times, prints `churn COUNT`
//   both A OFFSET LENGTH B OFFSET LENGTH   does two of these at once, on a thread each; prints `both HASH HASH`
//   block        makes the userfaultfd blocking, prints `block 0`
//   chatter      sends 1 MiB through the handshake socket, prints `chatter BYTES`: as many as were taken
//   quiet        stops the threads of the modes `remove` and `storm`, prints `quiet PASSES`
// End of file ends it. Whatever hangs for 30 s is killed by SIGALRM.
#define _GNU_SOURCE
#include "guest-memory.h"
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/un.h>

// The mode `remove` gives back every second stretch of this length; the tests know it, too.
#define STRETCH (64 * PAGE)

static struct region regions[2];
static int region_count;
static size_t total, page_size = PAGE;
static int uffd;
static atomic_bool stopping;
static atomic_long passes;
static pthread_t threads[3];
static int thread_count;

static void die(const char *what)
{
    fprintf(stderr, "guest-memory-client: %s: %s\n", what, strerror(errno));
    exit(1);
}

static void say(const char *format, ...) __attribute__((format(printf, 1, 2)));
static void say(const char *format, ...)
{
    va_list arguments;
    va_start(arguments, format);
    vprintf(format, arguments);
    va_end(arguments);
    fflush(stdout);
}

static void send_message(int sock, const void *bytes, size_t length, const int *fds, int count)
{
    // The server may refuse before everything is written: that is its right.
    if (send_with_descriptors(sock, bytes, length, fds, count) < 0 && errno != EPIPE && errno != ECONNRESET)
        die("sendmsg");
}

static size_t add_region(char *text, size_t at, const struct region *region)
{
    return at + sprintf(text + at, "%s{\"base_host_virt_addr\":%" PRIuPTR ",\"size\":%zu,\"offset\":%zu,\"page_size\":%zu,\"page_size_kib\":%zu}",
        at == 0 ? "[" : ",", (uintptr_t)region->base, region->size, region->offset, page_size, page_size);
}

// `once`: like a balloon that is inflated, through memory once; else over and over.
static void *remove_stretches(void *once)
{
    do {
        for (int i = 0; i < region_count; i++)
            for (size_t at = 0; at + STRETCH <= regions[i].size; at += STRETCH)
                if ((regions[i].offset + at) / STRETCH % 2 == 1 && madvise(regions[i].base + at, STRETCH, MADV_DONTNEED) != 0)
                    die("madvise");
        atomic_fetch_add(&passes, 1);
    } while (once == NULL && !atomic_load(&stopping));
    return NULL;
}

static void *touch_at_random(void *unused)
{
    (void)unused;
    unsigned long state = 88172645463325252UL;
    while (!atomic_load(&stopping)) {
        state ^= state << 13, state ^= state >> 7, state ^= state << 17;
        const struct region *region = &regions[state % region_count];
        (void)*(volatile unsigned char *)(region->base + (state >> 8) % region->size);
    }
    return NULL;
}

static void start_thread(void *(*body)(void *), void *argument)
{
    if (pthread_create(&threads[thread_count++], NULL, body, argument) != 0)
        die("pthread_create");
}

static unsigned char *at_offset(size_t offset)
{
    for (int i = 0; i < region_count; i++)
        if (offset >= regions[i].offset && offset < regions[i].offset + regions[i].size)
            return regions[i].base + (offset - regions[i].offset);
    errno = EFAULT;
    die("offset");
    return NULL;
}

struct action {
    char name[8];
    size_t offset, length;
    uint64_t result;
};

static void *act(void *argument)
{
    struct action *action = argument;
    action->result = action->length / PAGE;
    if (strcmp(action->name, "read") == 0)
        action->result = FNV_START;
    for (size_t at = action->offset; at < action->offset + action->length; at += PAGE) {
        unsigned char *page = at_offset(at);
        if (strcmp(action->name, "read") == 0) {
            action->result = hash_words(action->result, page);
        } else if (strcmp(action->name, "write") == 0) {
            __atomic_fetch_add(page + 8, 1, __ATOMIC_RELAXED); // the first touch is a write
        } else {
            // As much as lies in one region at once.
            size_t length = PAGE;
            while (at + length < action->offset + action->length && at_offset(at + length) == page + length)
                length += PAGE;
            if (madvise(page, length, MADV_DONTNEED) != 0)
                die("madvise");
            at += length - PAGE;
        }
    }
    return NULL;
}

static void act_both(struct action *first, struct action *second)
{
    pthread_t thread;
    if (pthread_create(&thread, NULL, act, first) != 0)
        die("pthread_create");
    act(second);
    pthread_join(thread, NULL);
    say("both %016" PRIx64 " %016" PRIx64 "\n", first->result, second->result);
}

static void churn(long count)
{
    for (long i = 0; i < count; i++) {
        if (i % 10000 == 0)
            alarm(30);
        if (madvise(regions[0].base, PAGE, MADV_DONTNEED) != 0)
            die("madvise");
    }
    say("churn %ld\n", count);
}

static void chatter(int sock)
{
    static const char words[4096];
    size_t sent = 0;
    while (sent < 1 << 20) {
        ssize_t count = send(sock, words, sizeof(words), MSG_NOSIGNAL);
        if (count < 0)
            break;
        sent += count;
    }
    say("chatter %zu\n", sent);
}

static void print_pages(void)
{
    say("pages %zu\n", total / PAGE);
    for (size_t offset = 0; offset < total; offset += PAGE) {
        for (int i = 0; i < region_count; i++) {
            if (offset < regions[i].offset || offset >= regions[i].offset + regions[i].size)
                continue;
            uint64_t hash = hash_words(FNV_START, regions[i].base + (offset - regions[i].offset));
            printf("%016" PRIx64 "\n", hash);
        }
    }
    fflush(stdout);
}

static void touch(void)
{
    for (int i = 0; i < region_count; i++)
        for (size_t at = 0; at < regions[i].size; at += PAGE)
            *(volatile unsigned char *)(regions[i].base + at) ^= 1;
    say("touched %zu\n", total / PAGE);
}

static void discard(void)
{
    size_t zero = 0;
    for (int i = 0; i < region_count; i++) {
        if (madvise(regions[i].base, regions[i].size, MADV_DONTNEED) != 0)
            die("madvise");
        for (size_t at = 0; at < regions[i].size; at += PAGE) {
            const uint64_t *words = (const uint64_t *)(regions[i].base + at);
            size_t w = 0;
            while (w < PAGE / 8 && words[w] == 0)
                w++;
            zero += w == PAGE / 8;
        }
    }
    say("discarded %zu\n", zero);
}

int main(int argc, char **argv)
{
    if (argc < 5 || argc > 6)
        return 2;
    const char *mode = argv[3];
    total = strtoull(argv[4], NULL, 10);
    int sock;
    if (strcmp(argv[1], "fd") == 0) {
        sock = atoi(argv[2]);
    } else {
        struct sockaddr_un address = { .sun_family = AF_UNIX };
        strncpy(address.sun_path, argv[2], sizeof(address.sun_path) - 1);
        sock = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
        if (connect(sock, (struct sockaddr *)&address, sizeof(address)) != 0)
            die("connect");
    }

    bool two = strcmp(mode, "two-regions") == 0 || strcmp(mode, "overlap") == 0;
    size_t gap = two ? total : 0;
    bool hugetlb = strcmp(mode, "huge") == 0, huge = hugetlb || strcmp(mode, "as-huge") == 0;
    page_size = huge ? 2UL << 20 : PAGE;
    size_t slack = huge && !hugetlb ? page_size : 0; // hugetlbfs aligns by itself
    unsigned char *memory = mmap(NULL, total + gap + slack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | (hugetlb ? MAP_HUGETLB : MAP_NORESERVE), -1, 0);
    if (memory == MAP_FAILED)
        die("mmap");
    memory += -(uintptr_t)memory % (slack ? slack : 1);
    if (two) {
        // The first half of the file lies at the higher address, with unregistered memory between the two.
        size_t half = (argc > 5 ? strtoull(argv[5], NULL, 10) : total / 2) / PAGE * PAGE;
        regions[0] = (struct region){ memory + total, half, 0 };
        regions[1] = (struct region){ memory, total - half, half };
        region_count = 2;
    } else {
        regions[0] = (struct region){ memory, total, 0 };
        region_count = 1;
    }
    const char *step;
    uffd = make_userfaultfd(regions, region_count, strcmp(mode, "blocking") == 0, &step);
    if (uffd < 0)
        die(step);

    struct region told[2] = { regions[0], regions[1] };
    if (strcmp(mode, "overlap") == 0)
        told[1].offset -= PAGE;
    if (strcmp(mode, "outlying") == 0)
        told[0].size += PAGE;
    if (strcmp(mode, "misaligned") == 0)
        told[0].base += 512;
    if (strcmp(mode, "unregistered") == 0)
        told[0].base -= 1UL << 30;
    static char text[10 << 20];
    size_t length = 0;
    for (int i = 0; i < region_count; i++)
        length = add_region(text, length, &told[i]);
    text[length++] = ']';
    say("base %" PRIxPTR "\n", (uintptr_t)regions[0].base);

    int null = open("/dev/null", O_RDONLY | O_CLOEXEC);
    if (strcmp(mode, "apart") == 0) {
        send_message(sock, text, length, NULL, 0);
        usleep(100000);
        send_message(sock, text, length, &uffd, 1);
    } else if (strcmp(mode, "glued") == 0) {
        send_message(sock, text, length, NULL, 0);
        send_message(sock, text, length, &uffd, 1);
    } else if (strcmp(mode, "in-pieces") == 0) {
        send_message(sock, text, 20, &uffd, 1);
        usleep(50000);
        send_message(sock, text + 20, 20, NULL, 0);
        usleep(50000);
        send_message(sock, text + 40, length - 40, NULL, 0);
    } else if (strcmp(mode, "no-descriptor") == 0) {
        send_message(sock, text, length, NULL, 0);
    } else if (strcmp(mode, "five-without-descriptor") == 0) {
        for (int i = 0; i < 5; i++) {
            send_message(sock, text, length, NULL, 0);
            usleep(50000);
        }
    } else if (strcmp(mode, "two-descriptors") == 0) {
        int two_fds[] = { uffd, null };
        send_message(sock, text, length, two_fds, 2);
    } else if (strcmp(mode, "nine-descriptors") == 0) {
        int nine[] = { uffd, null, null, null, null, null, null, null, null };
        send_message(sock, text, length, nine, 9);
    } else if (strcmp(mode, "no-userfaultfd") == 0) {
        send_message(sock, text, length, &null, 1);
    } else if (strcmp(mode, "malformed") == 0) {
        send_message(sock, "[{\"base_host_virt_addr\":zero}]", 30, &uffd, 1);
    } else if (*mode == '[' || *mode == '{') {
        send_message(sock, mode, strlen(mode), &uffd, 1);
    } else if (strcmp(mode, "ten-megabytes") == 0) {
        memset(text, ' ', sizeof(text));
        for (size_t at = 0; at < sizeof(text); at += 1 << 20)
            send_message(sock, text + at, 1 << 20, NULL, 0);
    } else if (strcmp(mode, "close") == 0) {
        close(sock);
    } else if (strcmp(mode, "die") == 0) {
        send_message(sock, text, length, &uffd, 1);
        raise(SIGKILL);
    } else if (strcmp(mode, "silence") != 0) {
        send_message(sock, text, length, &uffd, 1);
    }
    if (strcmp(mode, "remove") == 0) {
        start_thread(remove_stretches, &total);
        start_thread(touch_at_random, NULL);
    } else if (strcmp(mode, "storm") == 0) {
        start_thread(remove_stretches, NULL);
        start_thread(remove_stretches, NULL);
        start_thread(remove_stretches, NULL);
    }
    say("sent\n");

    char line[160];
    struct action first, second;
    while (fgets(line, sizeof(line), stdin) != NULL) {
        alarm(30);
        if (strcmp(line, "pages\n") == 0)
            print_pages();
        else if (strcmp(line, "touch\n") == 0)
            touch();
        else if (strcmp(line, "discard\n") == 0)
            discard();
        else if (sscanf(line, "both %7s %zu %zu %7s %zu %zu", first.name, &first.offset, &first.length, second.name, &second.offset, &second.length) == 6)
            act_both(&first, &second);
        else if (strcmp(line, "block\n") == 0)
            say("block %d\n", fcntl(uffd, F_SETFL, fcntl(uffd, F_GETFL) & ~O_NONBLOCK));
        else if (strncmp(line, "churn ", 6) == 0)
            churn(atol(line + 6));
        else if (strcmp(line, "chatter\n") == 0)
            chatter(sock);
        else if (sscanf(line, "%7s %zu %zu", first.name, &first.offset, &first.length) == 3) {
            act(&first);
            say("%s %0*" PRIx64 "\n", first.name, 16, first.result);
        } else if (strcmp(line, "quiet\n") == 0) {
            atomic_store(&stopping, true);
            while (thread_count > 0)
                pthread_join(threads[--thread_count], NULL);
            say("quiet %ld\n", atomic_load(&passes));
        }
        alarm(0);
    }
    return 0;
}
