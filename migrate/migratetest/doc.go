// Package migratetest has what tests of the engine and of its adapters need: a
// fake Guest whose memory can be verified after a failover, a fake Output that
// knows what left, a fake Shadow, a Network whose connections can be delayed, cut,
// broken and corrupted, and pairs of whole engines on them. Everything but the
// Network's use of time is deterministic, and all of it works in testing/synctest.
//
// It also has Need, by which a test says what of the machine it needs, and an Authority
// for certificates.
package migratetest
