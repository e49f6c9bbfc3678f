/*
 * PID 1 of the machine whose power is cut (PowerCutMachine.cs): the guest's own init until the disk is there, which is mounted writable; then the program
 * beside this one, with what stands after `--` on the kernel command line. When that ends, so does the machine.
 */
#define main guest_main
#include "../../guest/init.c"
#undef main

#define PROGRAM "/power-cut"
#define DISK "/disk"

int main(int count, char **words)
{
	int status, uevents;
	pid_t program;

	umask(022);
	mount_at("devtmpfs", "/dev", "devtmpfs", MS_NOSUID | MS_NOEXEC, NULL);
	console = open("/dev/console", O_RDWR | O_NOCTTY | O_CLOEXEC);
	mount_at("proc", "/proc", "proc", MS_NOSUID | MS_NODEV | MS_NOEXEC, NULL);
	mount_at("sysfs", "/sys", "sysfs", MS_NOSUID | MS_NODEV | MS_NOEXEC, NULL);
	uevents = open_uevents();
	load_modules(false);
	wait_for_root_device(uevents);
	close(uevents);
	/*
	 * Replays the journal. auto_da_alloc (ext4(5)) would write a file at its close that was truncated at its opening, as .NET opens
	 * them: it helps who forgets fsync, and no other file system does it.
	 */
	mount_at(ROOT_DEVICE, DISK, "ext4", MS_NOATIME, "noauto_da_alloc");

	program = fork();
	if (program < 0)
		fail("fork " PROGRAM);
	if (program == 0) {
		if (dup2(console, 0) < 0 || dup2(console, 1) < 0 || dup2(console, 2) < 0)
			fail("prepare " PROGRAM);
		execl(PROGRAM, PROGRAM, count > 1 ? words[1] : "", DISK "/home", (char *)NULL);
		fail("start " PROGRAM);
	}
	while (waitpid(-1, &status, 0) != program)
		;
	dprintf(console, "ended %d\n", WIFSIGNALED(status) ? 128 + WTERMSIG(status) : WEXITSTATUS(status));
	restart();
}
