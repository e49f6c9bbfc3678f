// Linked into dh: runs before its main, and before the runtime opens a descriptor.
//
// Whoever starts a program may close descriptors 0 to 2. What the program opens next then gets their numbers, and is read as its input or
// written to as its output. So they are opened on /dev/null: input is empty, messages are lost, and output, which must not be lost without
// a word, goes to a descriptor that cannot be written to (EBADF).

#include <errno.h>
#include <fcntl.h>
#include <unistd.h>

__attribute__((constructor(101))) static void open_standard_descriptors(void)
{
    static const int modes[] = { O_RDONLY, O_RDONLY, O_WRONLY };
    for (int number = 0; number < 3; number++)
        // open(2) takes the lowest number that is free: this one.
        if (fcntl(number, F_GETFD) < 0 && errno == EBADF && open("/dev/null", modes[number]) != number)
            _exit(125);
}
