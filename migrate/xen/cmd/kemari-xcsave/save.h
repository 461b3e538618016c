/* The C half of kemari-xcsave: libxenguest's checkpointed save with our
 * callbacks. Linked into the Go main by cgo. */
#ifndef KEMARI_SAVE_H
#define KEMARI_SAVE_H
#include <stdint.h>

/* Checkpoints domain domid until told to stop, its libxc stream going to
 * stream_fd, events to event_fd, commands from command_fd. Returns 0 if asked
 * to stop, else an exit status of the program. In the file mark_fd (or -1) one
 * byte says whether a suspend is under way. */
int kemari_save(uint32_t domid, int mark_fd, int stream_fd, int event_fd, int command_fd);

/* Saves domain domid, which stands suspended, to stream_fd, once and whole, and
 * leaves it standing. Log-dirty mode is off afterwards. Returns an exit status. */
int kemari_save_standing(uint32_t domid, int stream_fd);

/* Takes back what a dead kemari_save may have left: a suspended guest, the
 * suspend request, log-dirty mode. Returns 0, or 1 where something failed. */
int kemari_cleanup(uint32_t domid, int mark_fd);
#endif
