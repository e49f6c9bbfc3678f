#include "late_lock.h"

#include "filter.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/seccomp.h>
#include <pthread.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <unistd.h>

static int install(bool kvm, bool save)
{
    struct filter filter;
    build_late_filter(&filter, kvm, save, getpid());
    struct sock_fprog program = {.len = filter.length, .filter = filter.code};
    // Without a launcher nobody has set it; seccomp(2) asks for it.
    if (prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) != 0)
        return errno;
    long result = syscall(SYS_seccomp, SECCOMP_SET_MODE_FILTER, SECCOMP_FILTER_FLAG_TSYNC, &program);
    // A positive result is the thread that could not follow.
    return result == 0 ? 0 : result > 0 ? ESRCH : errno;
}

static void *wait_for_word(void *argument)
{
    int control = (int)(intptr_t)argument;
    char word[16];
    for (;;) {
        ssize_t length = read(control, word, sizeof word - 1);
        if (length < 0 && errno == EINTR)
            continue;
        if (length <= 0)
            _exit(EXIT_FAILURE);
        word[length] = '\0';
        bool kvm = strncmp(word, "lock kvm", 8) == 0, tcg = strncmp(word, "lock tcg", 8) == 0;
        bool save = length > 8 && strcmp(word + 8, " save") == 0;
        int error = (kvm || tcg) && (save || length == 8) ? install(kvm, save) : EPROTO;
        char answer[48];
        int size = error == 0 ? snprintf(answer, sizeof answer, "locked") : snprintf(answer, sizeof answer, "failed %s", strerrorname_np(error));
        ssize_t ignored = write(control, answer, (size_t)size); // dh is gone: the next read says so
        (void)ignored;
    }
}

void await_late_lock(void)
{
    const char *text = getenv("DH_LOCK_FD");
    if (!text)
        return;
    int control = atoi(text);
    unsetenv("DH_LOCK_FD");
    fcntl(control, F_SETFD, FD_CLOEXEC);
    // The VMM's signals are its own threads' business.
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    pthread_t thread;
    // Without the thread nobody answers, and dh says that the lock is missing.
    if (pthread_create(&thread, NULL, wait_for_word, (void *)(intptr_t)control) == 0)
        pthread_detach(thread);
    else
        close(control);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
}
