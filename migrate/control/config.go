package control

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"github.com/google/renameio/v2"
)

// Dir is the root of the run-time folders.
const Dir = "/run/kemari"

// Paths are the files of one side of one protection.
type Paths struct{ Dir, Config, Socket, Last string }

// PathsFor returns the files of the protection of the guest uuid under root,
// which is Dir everywhere but in tests.
func PathsFor(root string, role Role, uuid string) Paths {
	d := filepath.Join(root, string(role), uuid)
	return Paths{
		Dir:    d,
		Config: filepath.Join(d, "config.json"),
		Socket: filepath.Join(d, "control.sock"),
		Last:   filepath.Join(d, "last.json"),
	}
}

// Heartbeat is how life is shown and how long silence is borne.
type Heartbeat struct {
	Interval time.Duration `json:"interval"`
	Timeout  time.Duration `json:"timeout"`
}

// Arbiter is who decides whether one host may go on without the other.
type Arbiter struct {
	Type      string `json:"type"`      // "none" is the only one yet
	Automatic bool   `json:"automatic"` // with none: take over on silence alone
}

// PrimaryConfig is what kemari-replicator is told.
type PrimaryConfig struct {
	Domain      string `json:"domain"`
	UUID        string `json:"uuid"`
	DomID       uint32 `json:"domid"`
	MemoryKiB   uint64 `json:"memory_kib"`
	Generation  uint64 `json:"generation"`
	StandbyURI  string `json:"standby_uri"`
	StandbyAddr string `json:"standby_addr"` // host:port of the standby's data socket

	Checkpoint Checkpoint `json:"checkpoint"`
	Heartbeat  Heartbeat  `json:"heartbeat"`
	Arbiter    Arbiter    `json:"arbiter"`

	Channel Channel `json:"channel"`
}

// StandbyConfig is what kemari-standby is told.
type StandbyConfig struct {
	Domain      string    `json:"domain"`
	UUID        string    `json:"uuid"`
	DomainXML   string    `json:"domain_xml"` // as it shall run here
	MemoryKiB   uint64    `json:"memory_kib"`
	Generation  uint64    `json:"generation"`
	PrimaryHost string    `json:"primary_host"`
	Heartbeat   Heartbeat `json:"heartbeat"`
	Arbiter     Arbiter   `json:"arbiter"`

	Channel Channel `json:"channel"`
}

// WriteConfig makes the folder and replaces config.json in one step, readable by
// root only, since it holds a private key. A last.json of an earlier protection
// is removed, so that what one finds there belongs to this one.
func WriteConfig(p Paths, cfg any) error {
	b, err := json.MarshalIndent(cfg, "", "\t")
	if err != nil {
		return err
	}
	if err := os.MkdirAll(p.Dir, 0o750); err != nil {
		return err
	}
	if err := os.Remove(p.Last); err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	return renameio.WriteFile(p.Config, b, 0o600)
}

// ReadConfig fills cfg, a *PrimaryConfig or *StandbyConfig.
func ReadConfig(p Paths, cfg any) error {
	b, err := os.ReadFile(p.Config)
	if err != nil {
		return fmt.Errorf("read the protection's settings: %w", err)
	}
	if err := json.Unmarshal(b, cfg); err != nil {
		return fmt.Errorf("%s: %w", p.Config, err)
	}
	return nil
}

// WriteLast leaves the final status behind and removes config.json with the key.
func WriteLast(p Paths, s Status) error {
	b, err := json.MarshalIndent(s, "", "\t")
	if err != nil {
		return err
	}
	if err := renameio.WriteFile(p.Last, b, 0o640); err != nil {
		return err
	}
	if err := os.Remove(p.Config); err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	return nil
}
