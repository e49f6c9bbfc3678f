/*
 * init: PID 1 of the microVM, in the initrd and after it.
 *
 * It loads the drivers, puts a writable overlay over the read-only root disk, moves into it, and starts the runner.
 * Then it reaps orphans until the runner ends, which ends the machine: there is nothing to go on for.
 *
 * The initrd holds /init, /modules.list and the modules themselves. A line of the list is a module's path, in load order; before
 * the path of one that only a machine with a vsock channel needs stands VSOCK_MARK.
 * Every failure prints `dh init: STEP: ERRNO text` on the console and restarts; with the kernel's panic=-1 and the VMM's
 * -no-reboot (or its like) the machine is gone at once, and the line is the last one in the console's file.
 */
#include <errno.h>
#include <fcntl.h>
#include <linux/netlink.h>
#include <net/if.h>
#include <poll.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mount.h>
#include <sys/reboot.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <termios.h>
#include <time.h>
#include <unistd.h>

#define ROOT_DEVICE "/dev/vda"
#define ROOT_DEVICE_WAIT_MS 10000
#define NEW_ROOT "/newroot"

/* The guest channel is virtio-serial, unless the kernel command line says so. */
#define VSOCK_ARGUMENT "dh.channel=vsock"
#define VSOCK_MARK "vsock "

/* All that a guest writes, wherever it writes it, lands in this one tmpfs: one budget, and a full disk is ENOSPC, not the OOM killer. */
#define WRITABLE "/writable"
#define WRITABLE_OPTIONS "size=50%,mode=0755"

static int console = -1;

static _Noreturn void restart(void)
{
	tcdrain(console);
	reboot(RB_AUTOBOOT);
	_exit(1); /* PID 1 ending panics the kernel, which restarts as well (panic=-1) */
}

static _Noreturn __attribute__((format(printf, 1, 2))) void fail(const char *step, ...)
{
	int error = errno;
	const char *name = strerrorname_np(error);
	va_list arguments;

	dprintf(console, "dh init: ");
	va_start(arguments, step);
	vdprintf(console, step, arguments);
	va_end(arguments);
	dprintf(console, ": %s %s\n", name ? name : "?", strerror(error));
	restart();
}

static void make_directory(const char *path, mode_t mode)
{
	/* chmod: mkdir's mode is cut by the umask, and 01777 must stay 01777. */
	if (mkdir(path, mode) == 0 ? chmod(path, mode) != 0 : errno != EEXIST)
		fail("create %s", path);
}

static void mount_at(const char *source, const char *target, const char *type, unsigned long flags, const char *options)
{
	make_directory(target, 0755);
	if (mount(source, target, type, flags, options) != 0)
		fail("mount %s at %s", source, target);
}

static void write_file(const char *path, const char *text)
{
	size_t length = strlen(text);
	int fd = open(path, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0644);

	if (fd < 0 || write(fd, text, length) != (ssize_t)length || close(fd) != 0)
		fail("write %s", path);
}

static bool on_kernel_command_line(const char *wanted)
{
	char line[4096];
	char *rest = line;
	int fd = open("/proc/cmdline", O_RDONLY | O_CLOEXEC);
	ssize_t length = fd < 0 ? -1 : read(fd, line, sizeof(line) - 1);

	if (length < 0)
		fail("read /proc/cmdline");
	close(fd);
	line[length] = '\0';
	for (char *word; (word = strsep(&rest, " \n")) != NULL;)
		if (strcmp(word, wanted) == 0)
			return true;
	return false;
}

static void load_module(const char *path)
{
	int fd = open(path, O_RDONLY | O_CLOEXEC);

	if (fd < 0)
		fail("open %s", path);
	if (syscall(SYS_finit_module, fd, "", 0) != 0 && errno != EEXIST)
		fail("load %s", path);
	close(fd);
}

static void load_modules(bool vsock)
{
	char line[512];
	FILE *list = fopen("/modules.list", "re");

	if (list == NULL)
		fail("open /modules.list");
	while (fgets(line, sizeof(line), list) != NULL) {
		bool only_vsock = strncmp(line, VSOCK_MARK, strlen(VSOCK_MARK)) == 0;
		const char *path = only_vsock ? line + strlen(VSOCK_MARK) : line;

		line[strcspn(line, "\n")] = '\0';
		if (vsock || !only_vsock)
			load_module(path);
		unlink(path); /* the initrd lives in RAM, and RAM goes into the snapshot */
	}
	if (ferror(list))
		fail("read /modules.list");
	fclose(list);
	unlink("/modules.list");
	unlink("/init");
}

static long long now_ms(void)
{
	struct timespec now;

	clock_gettime(CLOCK_MONOTONIC, &now);
	return now.tv_sec * 1000LL + now.tv_nsec / 1000000;
}

static int open_uevents(void)
{
	struct sockaddr_nl address = { .nl_family = AF_NETLINK, .nl_groups = 1 /* the kernel's own events */ };
	int fd = socket(AF_NETLINK, SOCK_DGRAM | SOCK_CLOEXEC | SOCK_NONBLOCK, NETLINK_KOBJECT_UEVENT);

	if (fd < 0 || bind(fd, (struct sockaddr *)&address, sizeof(address)) != 0)
		fail("listen for device events");
	return fd;
}

/* A device's node appears before the device answers (ENXIO): its uevent comes last, so each event is a reason to try again. */
static void wait_for_root_device(int uevents)
{
	long long deadline_ms = now_ms() + ROOT_DEVICE_WAIT_MS;
	struct pollfd event = { .fd = uevents, .events = POLLIN };
	char ignored[8192];

	for (;;) {
		int fd = open(ROOT_DEVICE, O_RDONLY | O_CLOEXEC);
		long long left_ms = deadline_ms - now_ms();

		if (fd >= 0) {
			close(fd);
			return;
		}
		if ((errno != ENOENT && errno != ENXIO) || left_ms <= 0)
			fail("wait for " ROOT_DEVICE);
		poll(&event, 1, (int)left_ms);
		while (recv(uevents, ignored, sizeof(ignored), 0) > 0)
			;
	}
}

static void bind_writable(const char *name, const char *target, mode_t mode)
{
	char source[64];

	snprintf(source, sizeof(source), WRITABLE "/%s", name);
	make_directory(source, mode);
	mount_at(source, target, NULL, MS_BIND, NULL);
}

static void build_root(void)
{
	mount_at(ROOT_DEVICE, "/disk", "ext4", MS_RDONLY | MS_NOATIME, NULL);
	mount_at("tmpfs", WRITABLE, "tmpfs", MS_NOATIME, WRITABLE_OPTIONS);
	make_directory(WRITABLE "/upper", 0755);
	make_directory(WRITABLE "/work", 0755);
	mount_at("overlay", NEW_ROOT, "overlay", MS_NOATIME,
		 "lowerdir=/disk,upperdir=" WRITABLE "/upper,workdir=" WRITABLE "/work");

	mount_at("/dev", NEW_ROOT "/dev", NULL, MS_MOVE, NULL);
	mount_at("/proc", NEW_ROOT "/proc", NULL, MS_MOVE, NULL);
	mount_at("sysfs", NEW_ROOT "/sys", "sysfs", MS_NOSUID | MS_NODEV | MS_NOEXEC, NULL);
	mount_at("cgroup2", NEW_ROOT "/sys/fs/cgroup", "cgroup2", MS_NOSUID | MS_NODEV | MS_NOEXEC, NULL);
	mount_at("devpts", NEW_ROOT "/dev/pts", "devpts", MS_NOSUID | MS_NOEXEC, "ptmxmode=0666,mode=0620");
	bind_writable("shm", NEW_ROOT "/dev/shm", 01777);
	bind_writable("tmp", NEW_ROOT "/tmp", 01777);
	bind_writable("run", NEW_ROOT "/run", 0755);
	make_directory(NEW_ROOT "/workspace", 0755);
}

/* What udev would make. */
static void link_standard_streams(void)
{
	static const char *const links[][2] = {
		{ "/proc/self/fd", NEW_ROOT "/dev/fd" },
		{ "/proc/self/fd/0", NEW_ROOT "/dev/stdin" },
		{ "/proc/self/fd/1", NEW_ROOT "/dev/stdout" },
		{ "/proc/self/fd/2", NEW_ROOT "/dev/stderr" },
	};

	for (size_t i = 0; i < sizeof(links) / sizeof(links[0]); i++)
		if (symlink(links[i][0], links[i][1]) != 0 && errno != EEXIST)
			fail("link %s", links[i][1]);
}

static void enter_root(void)
{
	if (chdir(NEW_ROOT) != 0 || mount(".", "/", NULL, MS_MOVE, NULL) != 0 || chroot(".") != 0 || chdir("/") != 0)
		fail("move into the root");
}

/*
 * What tells one clone from another is a file on tmpfs under each well-known path: the runner keeps both open and
 * rewrites them in place after a restore. They have their final length from the start.
 */
static void bind_identity(const char *path, const char *name, const char *placeholder)
{
	char file[64];

	snprintf(file, sizeof(file), "/run/dh/%s", name);
	make_directory("/run/dh", 0755);
	write_file(file, placeholder);
	if (access(path, F_OK) != 0)
		write_file(path, "");
	if (mount(file, path, NULL, MS_BIND, NULL) != 0)
		fail("mount %s at %s", file, path);
}

static void bring_loopback_up(void)
{
	struct ifreq request = { .ifr_name = "lo", .ifr_flags = IFF_UP };
	int fd = socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0);

	if (fd < 0 || ioctl(fd, SIOCSIFFLAGS, &request) != 0)
		fail("bring the loopback interface up");
	close(fd);
}

/* What costs a clone time without being of use to it. A kernel that lacks one of these has nothing to be tuned. */
static void tune_kernel(void)
{
	static const struct {
		const char *path, *value;
	} settings[] = {
		/* The same code at the same address in every process: an emulator translates it once. The clones share a layout anyway. */
		{ "/proc/sys/kernel/randomize_va_space", "0" },
		/* A huge page is cleared as a whole when one byte of it is touched. */
		{ "/sys/kernel/mm/transparent_hugepage/enabled", "madvise" },
		/* Housekeeping that would run just after a restore, and again and again in a clone that waits. */
		{ "/proc/sys/vm/compaction_proactiveness", "0" },
		{ "/proc/sys/vm/stat_interval", "3600" },
		{ "/proc/sys/vm/dirty_writeback_centisecs", "0" },
	};

	for (size_t i = 0; i < sizeof(settings) / sizeof(settings[0]); i++)
		if (access(settings[i].path, F_OK) == 0)
			write_file(settings[i].path, settings[i].value);
}

static pid_t start_runner(bool vsock)
{
	char *const channel = vsock ? "vsock" : "virtio-serial";
	char *const arguments[] = { "/usr/bin/python3", "-I", "-u", "/usr/lib/dh/runner.py", channel, NULL };
	char *const environment[] = {
		"HOME=/root", "LANG=C.UTF-8", "LOGNAME=root", "USER=root", "SHELL=/bin/sh",
		"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", NULL,
	};
	pid_t pid = fork();

	if (pid < 0)
		fail("fork the runner");
	if (pid > 0)
		return pid;
	int input = open("/dev/null", O_RDONLY);
	if (setsid() < 0 || input < 0 || dup2(input, 0) < 0 || dup2(console, 1) < 0 || dup2(console, 2) < 0)
		fail("prepare the runner");
	if (input > 2)
		close(input);
	execve(arguments[0], arguments, environment);
	fail("start %s", arguments[0]);
}

int main(void)
{
	umask(022);
	mount_at("devtmpfs", "/dev", "devtmpfs", MS_NOSUID | MS_NOEXEC, NULL);
	console = open("/dev/console", O_RDWR | O_NOCTTY | O_CLOEXEC);
	mount_at("proc", "/proc", "proc", MS_NOSUID | MS_NODEV | MS_NOEXEC, NULL);
	if (on_kernel_command_line("dh.probe")) {
		dprintf(console, "dh-probe: booted\n");
		restart();
	}

	bool vsock = on_kernel_command_line(VSOCK_ARGUMENT);
	int uevents = open_uevents(); /* before the drivers: no event is missed */
	load_modules(vsock);
	wait_for_root_device(uevents);
	close(uevents);
	build_root();
	link_standard_streams();
	enter_root();

	bind_identity("/etc/machine-id", "machine-id", "00000000000000000000000000000000\n");
	bind_identity("/proc/sys/kernel/random/boot_id", "boot_id", "00000000-0000-0000-0000-000000000000\n");
	bring_loopback_up();
	tune_kernel();
	/* The runner inherits it, and gives it up for the code that it starts. */
	write_file("/proc/self/oom_score_adj", "-1000");

	pid_t runner = start_runner(vsock);
	int status;
	pid_t ended;
	do
		ended = waitpid(-1, &status, 0);
	while (ended != runner && (ended > 0 || errno == EINTR));
	if (ended != runner)
		fail("wait for the runner");
	if (WIFSIGNALED(status))
		dprintf(console, "dh init: the runner ended by signal %d\n", WTERMSIG(status));
	else
		dprintf(console, "dh init: the runner ended with status %d\n", WEXITSTATUS(status));
	restart();
}
