#include <dlfcn.h>
#include <stdio.h>

#include "libxen.h"

static int version(const char *what)
{
	char path[64];
	int n = -1;
	snprintf(path, sizeof path, "/sys/hypervisor/version/%s", what);
	FILE *f = fopen(path, "re");
	if (!f)
		return -1;
	if (fscanf(f, "%d", &n) != 1)
		n = -1;
	fclose(f);
	return n;
}

const struct libxen *libxen_load(void)
{
	static struct libxen x;
	int major = version("major"), minor = version("minor");
	char name[64];

	if (major < 0 || minor < 0) {
		fputs("kemari-xcsave: this is no Xen host: nothing in /sys/hypervisor/version\n", stderr);
		return NULL;
	}
	/* Outside these nobody has looked whether the structures are the same. */
	if (major != 4 || minor < 17 || minor > 20) {
		fprintf(stderr, "kemari-xcsave: Xen %d.%d is not known, only 4.17 to 4.20 are\n", major, minor);
		return NULL;
	}
	/* libxenguest brings libxenctrl along. */
	snprintf(name, sizeof name, "libxenguest.so.%d.%d", major, minor);
	void *lib = dlopen(name, RTLD_NOW);
	if (!lib) {
		fprintf(stderr, "kemari-xcsave: %s\n", dlerror());
		return NULL;
	}
#define X(f) \
	if (!(x.f = (__typeof__(f) *)dlsym(lib, #f))) { \
		fprintf(stderr, "kemari-xcsave: %s\n", dlerror()); \
		return NULL; \
	}
	LIBXEN_FUNCTIONS(X)
#undef X
	return &x;
}
