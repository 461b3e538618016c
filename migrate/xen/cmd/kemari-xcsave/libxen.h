/* libxenctrl and libxenguest have another name in each Xen release, and each
 * serves only its own hypervisor. We are built with one release's headers and may
 * meet another's Xen, so we take the libraries of the one that runs. Only what has
 * the same arguments and structures from 4.17 to 4.20 is used. */
#include <xenctrl.h>
#include <xenguest.h>

#define LIBXEN_FUNCTIONS(X) \
	X(xc_interface_open) \
	X(xc_interface_close) \
	X(xc_domain_getinfolist) \
	X(xc_domain_resume) \
	X(xc_domain_save) \
	X(xc_domain_subscribe_for_suspend) \
	X(xc_evtchn_alloc_unbound) \
	X(xc_shadow_control)

struct libxen {
#define X(f) __typeof__(f) *f;
	LIBXEN_FUNCTIONS(X)
#undef X
};

/* NULL, with the reason on stderr, if this is no Xen whose libraries are here. */
const struct libxen *libxen_load(void);
