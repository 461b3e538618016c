/*
 * Protects a guest through libvirt's C library: flag CONNECTION GUEST DESTINATION FLAGS
 *
 * libvirt's headers are not needed for these few of its functions.
 */
#include <stdio.h>
#include <stdlib.h>

typedef struct _virConnect *virConnectPtr;
typedef struct _virDomain *virDomainPtr;
typedef struct _virTypedParameter *virTypedParameterPtr;

extern virConnectPtr virConnectOpen(const char *name);
extern int virConnectClose(virConnectPtr conn);
extern virDomainPtr virDomainLookupByName(virConnectPtr conn, const char *name);
extern int virDomainFree(virDomainPtr domain);
extern int virDomainMigrateToURI3(virDomainPtr domain, const char *dconnuri,
                                  virTypedParameterPtr params,
                                  unsigned int nparams, unsigned int flags);

int main(int argc, char **argv)
{
    virConnectPtr conn;
    virDomainPtr domain;
    int ret;

    if (argc != 5)
        return 2;
    if (!(conn = virConnectOpen(argv[1])))
        return 1; /* the library has printed why */
    if (!(domain = virDomainLookupByName(conn, argv[2])))
        return 1;
    ret = virDomainMigrateToURI3(domain, argv[3], NULL, 0, strtoul(argv[4], NULL, 0));
    virDomainFree(domain);
    virConnectClose(conn);
    return ret < 0 ? 1 : 0;
}
