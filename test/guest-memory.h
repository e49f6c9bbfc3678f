// What every program that plays a VMM's memory side shares: the userfaultfd, the handshake's message, the hash of a page.
// Firecracker's side of it: UFFDIO_API with EVENT_REMOVE alone, UFFDIO_REGISTER for missing pages, a descriptor without blocking.
#ifndef GUEST_MEMORY_H
#define GUEST_MEMORY_H

#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <linux/userfaultfd.h>
#include <stdbool.h>
#include <stdint.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <unistd.h>

#define PAGE 4096UL

struct region {
    unsigned char *base;
    size_t size, offset; // bytes; the offset is the one in the memory file
};

// Returns the descriptor; or -1 with errno, and the step that failed in `step`.
static inline int make_userfaultfd(const struct region *regions, int count, bool blocking, const char **step)
{
    *step = "open /dev/userfaultfd";
    int device = open("/dev/userfaultfd", O_RDWR | O_CLOEXEC);
    if (device < 0)
        return -1;
    *step = "USERFAULTFD_IOC_NEW";
    int made = ioctl(device, USERFAULTFD_IOC_NEW, O_CLOEXEC | (blocking ? 0 : O_NONBLOCK));
    close(device);
    if (made < 0)
        return -1;
    *step = "UFFDIO_API";
    struct uffdio_api api = { .api = UFFD_API, .features = UFFD_FEATURE_EVENT_REMOVE };
    bool done = ioctl(made, UFFDIO_API, &api) == 0;
    for (int i = 0; done && i < count; i++) {
        *step = "UFFDIO_REGISTER";
        struct uffdio_register reg = { .range = { (uintptr_t)regions[i].base, regions[i].size }, .mode = UFFDIO_REGISTER_MODE_MISSING };
        done = ioctl(made, UFFDIO_REGISTER, &reg) == 0;
    }
    if (!done) {
        int error = errno;
        close(made);
        errno = error;
        return -1;
    }
    return made;
}

// Sends bytes, and descriptors with them (at most 16). Returns what sendmsg does.
static inline ssize_t send_with_descriptors(int sock, const void *bytes, size_t length, const int *fds, int count)
{
    char control[CMSG_SPACE(16 * sizeof(int))] = { 0 };
    struct iovec iov = { (void *)bytes, length };
    struct msghdr message = { .msg_iov = &iov, .msg_iovlen = 1 };
    if (count > 0) {
        message.msg_control = control;
        message.msg_controllen = CMSG_SPACE(count * sizeof(int));
        struct cmsghdr *header = CMSG_FIRSTHDR(&message);
        header->cmsg_level = SOL_SOCKET;
        header->cmsg_type = SCM_RIGHTS;
        header->cmsg_len = CMSG_LEN(count * sizeof(int));
        memcpy(CMSG_DATA(header), fds, count * sizeof(int));
    }
    return sendmsg(sock, &message, MSG_NOSIGNAL);
}

// FNV-1a over 64-bit words; start with FNV_START.
#define FNV_START 14695981039346656037UL
static inline uint64_t hash_words(uint64_t hash, const void *page)
{
    const uint64_t *words = page;
    for (size_t w = 0; w < PAGE / 8; w++)
        hash = (hash ^ words[w]) * 1099511628211UL;
    return hash;
}

#endif
