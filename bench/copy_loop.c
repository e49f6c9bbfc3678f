// The least that an eager page server has to do, in C, to compare with: takes the handshake of test/guest-memory-client.c on an inherited
// socket, maps the memory file, walks its data extents, copies them in pieces of 4 MiB with UFFDIO_COPY on N threads, unregisters, closes.
//
//   copy_loop FD MEMORY_FILE WORKERS      prints the microseconds from the opening of the file to the closing of the userfaultfd
//
// It trusts its peer, handles no event and no refusal: a lower bound, not a page server.
#define _GNU_SOURCE
#include <fcntl.h>
#include <linux/userfaultfd.h>
#include <pthread.h>
#include <stdatomic.h>
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

#define PIECE (4UL << 20)
#define MAX_PIECES (1UL << 20)

static struct uffdio_copy pieces[MAX_PIECES];
static size_t piece_count;
static atomic_size_t next;
static int uffd;

static void die(const char *what)
{
    perror(what);
    exit(1);
}

static void *copy_pieces(void *unused)
{
    (void)unused;
    for (size_t i; (i = atomic_fetch_add(&next, 1)) < piece_count;)
        for (uint64_t done = 0; done < pieces[i].len;) {
            struct uffdio_copy copy = { .dst = pieces[i].dst + done, .src = pieces[i].src + done, .len = pieces[i].len - done };
            if (ioctl(uffd, UFFDIO_COPY, &copy) != 0 && copy.copy <= 0)
                die("UFFDIO_COPY");
            done += copy.copy;
        }
    return NULL;
}

static int receive(int sock, char *text, size_t size)
{
    char control[CMSG_SPACE(sizeof(int))];
    struct iovec iov = { text, size - 1 };
    struct msghdr message = { .msg_iov = &iov, .msg_iovlen = 1, .msg_control = control, .msg_controllen = sizeof(control) };
    ssize_t length = recvmsg(sock, &message, MSG_CMSG_CLOEXEC);
    if (length <= 0 || CMSG_FIRSTHDR(&message) == NULL)
        die("recvmsg");
    text[length] = 0;
    int fd;
    memcpy(&fd, CMSG_DATA(CMSG_FIRSTHDR(&message)), sizeof(fd));
    return fd;
}

int main(int argc, char **argv)
{
    if (argc != 4)
        return 2;
    int workers = atoi(argv[3]);
    struct timespec start, end;
    clock_gettime(CLOCK_MONOTONIC, &start);
    int file = open(argv[2], O_RDONLY | O_CLOEXEC);
    struct stat status;
    if (file < 0 || fstat(file, &status) != 0)
        die(argv[2]);
    char *source = mmap(NULL, status.st_size, PROT_READ, MAP_SHARED, file, 0);
    if (source == MAP_FAILED)
        die("mmap");
    char text[4096];
    uffd = receive(atoi(argv[1]), text, sizeof(text));
    const char *address = strstr(text, "base_host_virt_addr\":");
    if (address == NULL)
        return 3;
    uint64_t base = strtoull(strchr(address, ':') + 1, NULL, 10);
    for (off_t data, hole = 0; (data = lseek(file, hole, SEEK_DATA)) >= 0;) {
        hole = lseek(file, data, SEEK_HOLE);
        for (off_t at = data; at < hole && piece_count < MAX_PIECES; at += PIECE) {
            uint64_t length = (uint64_t)(hole - at) < PIECE ? (uint64_t)(hole - at) : PIECE;
            pieces[piece_count++] = (struct uffdio_copy){ .dst = base + at, .src = (uintptr_t)source + at, .len = length };
        }
    }
    pthread_t threads[64];
    for (int i = 1; i < workers; i++)
        pthread_create(&threads[i], NULL, copy_pieces, NULL);
    copy_pieces(NULL);
    for (int i = 1; i < workers; i++)
        pthread_join(threads[i], NULL);
    struct uffdio_range range = { base, status.st_size };
    if (ioctl(uffd, UFFDIO_UNREGISTER, &range) != 0)
        die("UFFDIO_UNREGISTER");
    close(uffd);
    clock_gettime(CLOCK_MONOTONIC, &end);
    printf("%ld\n", (end.tv_sec - start.tv_sec) * 1000000L + (end.tv_nsec - start.tv_nsec) / 1000);
    return 0;
}
