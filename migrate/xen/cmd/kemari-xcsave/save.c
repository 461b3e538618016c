#include <errno.h>
#include <inttypes.h>
#include <poll.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "libxen.h" /* before Xen's other headers, which leave out what it needs */

#include <xenevtchn.h>
#include <xenstore.h>

#include "save.h"

/* A guest that runs and has not suspended by then never will: Linux gives up
 * freezing its processes after 20 s. */
#define SUSPEND_TIMEOUT_MS 25000
/* How often we look whether the guest is still there and not paused. */
#define LOOK_MS 250

enum { EXIT_STOP = 0, EXIT_FAILED = 1, EXIT_GUEST_GONE = 3, EXIT_NO_SUSPEND = 4, EXIT_NO_LOGDIRTY = 5 };

static const struct libxen *xen;

struct save {
	xc_interface *xch;
	xenevtchn_handle *xce;
	struct xs_handle *xs;
	uint32_t domid;
	int port; /* local end of the guest's suspend event channel */
	int event_fd, command_fd;
	int mark_fd; /* file that says whether a suspend is under way, or -1 */
	int why; /* exit status, once we know why we stop; -1 before */
	double suspended;
};

static double now_us(void)
{
	struct timespec t;
	clock_gettime(CLOCK_MONOTONIC, &t);
	return t.tv_sec * 1e6 + t.tv_nsec / 1e3;
}

static void event(struct save *s, const char *fmt, ...)
{
	char line[256];
	va_list ap;
	va_start(ap, fmt);
	int n = vsnprintf(line, sizeof line - 1, fmt, ap);
	va_end(ap);
	if (n < 0 || n >= (int)sizeof line - 1)
		return;
	line[n++] = '\n';
	for (int off = 0; off < n;) {
		ssize_t w = write(s->event_fd, line + off, n - off);
		if (w < 0 && errno == EINTR)
			continue;
		if (w <= 0)
			return; /* the replicator is gone; its commands' end tells us */
		off += w;
	}
}

static int stop(struct save *s, int why)
{
	if (s->why < 0)
		s->why = why;
	return 0; /* what libxenguest's callbacks return to end the save */
}

/* Blocks for the replicator's word: 'g' to go on. Anything else, its end of the
 * pipe closed included, is to stop. */
static int may_go_on(struct save *s)
{
	char c;
	ssize_t n;
	do
		n = read(s->command_fd, &c, 1);
	while (n < 0 && errno == EINTR);
	return n == 1 && c == 'g';
}

static int told_to_stop(struct save *s)
{
	struct pollfd p = { .fd = s->command_fd, .events = POLLIN };
	return poll(&p, 1, 0) > 0; /* nothing else is sent while we suspend */
}

/* 1: shut down for suspend; 0: runs; -1: gone or going for another reason. */
static int look(struct save *s, int *paused)
{
	xc_domaininfo_t i;
	if (xen->xc_domain_getinfolist(s->xch, s->domid, 1, &i) != 1 || i.domain != s->domid || (i.flags & XEN_DOMINF_dying))
		return -1;
	*paused = !!(i.flags & XEN_DOMINF_paused);
	if (!(i.flags & XEN_DOMINF_shutdown))
		return 0;
	return (i.flags >> XEN_DOMINF_shutdownshift & XEN_DOMINF_shutdownmask) == SHUTDOWN_suspend ? 1 : -1;
}

static int request(struct save *s, const char *what)
{
	char path[64];
	snprintf(path, sizeof path, "/local/domain/%" PRIu32 "/control/shutdown", s->domid);
	return xs_write(s->xs, XBT_NULL, path, what, strlen(what));
}

/* Says, for kemari_cleanup should we be killed, whether a suspend is under way. */
static void mark(struct save *s, char c)
{
	if (s->mark_fd >= 0 && pwrite(s->mark_fd, &c, 1, 0) != 1)
		perror("kemari-xcsave: write the mark");
}

/* Takes the request back if the guest has not seen it yet: 1, else 0. The guest
 * reads and empties the node in a transaction too, so only one of us wins. */
static int withdraw(struct save *s)
{
	char path[64];
	snprintf(path, sizeof path, "/local/domain/%" PRIu32 "/control/shutdown", s->domid);
	for (;;) {
		unsigned len;
		xs_transaction_t t = xs_transaction_start(s->xs);
		char *v = t ? xs_read(s->xs, t, path, &len) : NULL;
		int unseen = v && !strcmp(v, "suspend");
		free(v);
		if (unseen)
			xs_write(s->xs, t, path, "", 0);
		if (!t || xs_transaction_end(s->xs, t, !unseen) || errno != EAGAIN)
			return unseen;
	}
}

/* Ends a suspend that may be under way, with the guest running. A guest that has
 * seen the request will suspend, and nobody but us would resume it: so it is let
 * get there first. */
static void unsuspend(struct save *s)
{
	int paused;
	double start = now_us();
	if (!withdraw(s))
		while (look(s, &paused) == 0 && !paused && now_us() - start < SUSPEND_TIMEOUT_MS * 1e3)
			usleep(5000);
	if (look(s, &paused) == 1 && xen->xc_domain_resume(s->xch, s->domid, 1))
		perror("kemari-xcsave: resume");
	mark(s, 'r');
}

static int cb_suspend(void *data)
{
	struct save *s = data;
	double start = now_us(), waited_from = start;
	int paused = 0;

	if (look(s, &paused) < 0)
		return stop(s, EXIT_GUEST_GONE);
	mark(s, 's');
	if (!request(s, "suspend")) {
		perror("kemari-xcsave: write control/shutdown");
		return stop(s, EXIT_FAILED);
	}
	for (;;) {
		struct pollfd p[2] = {
			{ .fd = xenevtchn_fd(s->xce), .events = POLLIN },
			{ .fd = s->command_fd, .events = POLLIN },
		};
		int n = poll(p, 2, LOOK_MS);
		if (n > 0 && p[0].revents) {
			int port = xenevtchn_pending(s->xce);
			if (port >= 0)
				xenevtchn_unmask(s->xce, port);
		}
		int state = look(s, &paused);
		if (state == 1)
			break;
		if (state < 0)
			return stop(s, EXIT_GUEST_GONE);
		if (told_to_stop(s)) {
			unsuspend(s);
			return stop(s, EXIT_STOP);
		}
		/* A guest the operator has paused cannot answer, and changes nothing
		 * either: that is no fault, and no reason to hurry. */
		if (paused)
			waited_from = now_us();
		if (now_us() - waited_from > SUSPEND_TIMEOUT_MS * 1e3) {
			unsuspend(s);
			return stop(s, EXIT_NO_SUSPEND);
		}
	}
	s->suspended = now_us();
	event(s, "suspended %.0f", s->suspended - start);
	/* The replicator seals the epoch's output before anything is read. */
	if (!may_go_on(s))
		return stop(s, EXIT_STOP);
	return 1;
}

static int cb_postcopy(void *data)
{
	struct save *s = data;
	double copied = now_us();
	if (xen->xc_domain_resume(s->xch, s->domid, 1)) {
		perror("kemari-xcsave: resume");
		return stop(s, EXIT_FAILED);
	}
	mark(s, 'r');
	event(s, "resumed %.0f %.0f", copied - s->suspended, now_us() - copied);
	return 1;
}

static int cb_checkpoint(void *data)
{
	struct save *s = data;
	return may_go_on(s) ? 1 : stop(s, EXIT_STOP);
}

static int cb_switch_qemu_logdirty(uint32_t domid, unsigned enable, void *data)
{
	(void)domid, (void)enable, (void)data;
	return 0; /* PVH has no device model */
}

int kemari_save(uint32_t domid, int mark_fd, int stream_fd, int event_fd, int command_fd)
{
	struct save s = { .mark_fd = mark_fd, .domid = domid, .event_fd = event_fd, .command_fd = command_fd, .why = -1, .port = -1 };
	struct save_callbacks cb = {
		.suspend = cb_suspend,
		.postcopy = cb_postcopy,
		.checkpoint = cb_checkpoint,
		.switch_qemu_logdirty = cb_switch_qemu_logdirty,
		.data = &s,
	};
	int rc, guest_port = -1, paused;

	if (!xen && !(xen = libxen_load()))
		return EXIT_FAILED;
	s.xch = xen->xc_interface_open(0, 0, 0);
	s.xce = xenevtchn_open(0, 0);
	s.xs = xs_open(0);
	if (!s.xch || !s.xce || !s.xs) {
		perror("kemari-xcsave: open Xen's interfaces");
		return EXIT_FAILED;
	}
	if (look(&s, &paused) < 0)
		return EXIT_GUEST_GONE;

	/* Probe what XSA-495's builds refuse before the guest is touched. */
	if (xen->xc_shadow_control(s.xch, domid, XEN_DOMCTL_SHADOW_OP_ENABLE_LOGDIRTY, NULL, 0) < 0) {
		perror("kemari-xcsave: log-dirty");
		return EXIT_NO_LOGDIRTY;
	}

	/* With a suspend event channel of ours Xen signals that and not VIRQ_DOM_EXC,
	 * so neither xenstored nor libvirt takes a checkpoint for a shutdown. */
	guest_port = xen->xc_evtchn_alloc_unbound(s.xch, domid, 0);
	if (guest_port < 0 || (s.port = xenevtchn_bind_interdomain(s.xce, domid, guest_port)) < 0 ||
	    xen->xc_domain_subscribe_for_suspend(s.xch, domid, guest_port)) {
		perror("kemari-xcsave: suspend event channel");
		kemari_cleanup(domid, mark_fd);
		return EXIT_FAILED;
	}
	if ((rc = xenevtchn_pending(s.xce)) >= 0) /* a fresh channel is pending once */
		xenevtchn_unmask(s.xce, rc);

	rc = xen->xc_domain_save(s.xch, stream_fd, domid, XCFLAGS_LIVE, &cb, XC_STREAM_REMUS, -1);
	int err = errno;
	if (s.why < 0) {
		/* libxenguest failed by itself; a guest that ended in the middle is the
		 * usual reason. */
		fprintf(stderr, "kemari-xcsave: xc_domain_save: %d, %s\n", rc, strerror(err));
		s.why = look(&s, &paused) < 0 ? EXIT_GUEST_GONE : EXIT_FAILED;
	}
	kemari_cleanup(domid, mark_fd);
	return s.why;
}

static int cb_stands(void *data)
{
	(void)data;
	return 1;
}

int kemari_save_standing(uint32_t domid, int stream_fd)
{
	struct save s = { .domid = domid, .mark_fd = -1 };
	struct save_callbacks cb = {
		.suspend = cb_stands,
		.switch_qemu_logdirty = cb_switch_qemu_logdirty,
		.data = &s,
	};
	int paused;

	if (!xen && !(xen = libxen_load()))
		return EXIT_FAILED;
	s.xch = xen->xc_interface_open(0, 0, 0);
	if (!s.xch) {
		perror("kemari-xcsave: open Xen's interfaces");
		return EXIT_FAILED;
	}
	switch (look(&s, &paused)) {
	case -1:
		return EXIT_GUEST_GONE;
	case 0:
		fprintf(stderr, "kemari-xcsave: the guest does not stand suspended\n");
		return EXIT_FAILED;
	}
	int rc = xen->xc_domain_save(s.xch, stream_fd, domid, 0, &cb, XC_STREAM_PLAIN, -1);
	if (rc)
		fprintf(stderr, "kemari-xcsave: xc_domain_save: %d, %s\n", rc, strerror(errno));
	xen->xc_interface_close(s.xch);
	return rc ? EXIT_FAILED : 0;
}

int kemari_cleanup(uint32_t domid, int mark_fd)
{
	struct save s = { .domid = domid, .mark_fd = mark_fd };
	int paused = 0, rc = 0;
	char m = 'r';

	if (!xen && !(xen = libxen_load()))
		return EXIT_FAILED;
	s.xch = xen->xc_interface_open(0, 0, 0);
	s.xs = xs_open(0);
	if (!s.xch || !s.xs) {
		perror("kemari-xcsave: open Xen's interfaces");
		return 1;
	}
	if (look(&s, &paused) >= 0) {
		if ((mark_fd >= 0 && pread(mark_fd, &m, 1, 0) == 1 && m == 's') || look(&s, &paused) == 1)
			unsuspend(&s);
		/* Fails with EINVAL where it is off already. */
		xen->xc_shadow_control(s.xch, domid, XEN_DOMCTL_SHADOW_OP_OFF, NULL, 0);
		/* Port 0 unsubscribes: shutdowns are libvirt's to see again. */
		if (xen->xc_domain_subscribe_for_suspend(s.xch, domid, 0)) {
			perror("kemari-xcsave: unsubscribe from suspend");
			rc = 1;
		}
		if (look(&s, &paused) == 1)
			rc = 1;
	}
	xs_close(s.xs);
	xen->xc_interface_close(s.xch);
	return rc;
}
