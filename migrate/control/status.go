package control

import "time"

// Role says on which side of a protection a process stands.
type Role string

const (
	Primary Role = "primary" // the guest runs here, its replicator sends
	Standby Role = "standby" // the shadow waits here
)

// Phase is where a protection stands, seen from one side.
//
//	primary:  starting ──► copying ──► protected ──► ending ──► ended
//	                                     ▲   ▼  ▲
//	                                     alone  └► switching-over ──► ended
//	standby:  starting ──► waiting ──► copying ──► ready ──► ended
//	                                                └──► taking-over ──► active
//
// Any phase may go to ended; Status.Error then says why, unless it was asked for.
type Phase string

const (
	Starting   Phase = "starting"       // checking, opening what it needs
	Waiting    Phase = "waiting"        // standby: listening for its primary
	Copying    Phase = "copying"        // the first whole copy is under way; not protected yet
	Protected  Phase = "protected"      // primary: the standby has at least one epoch
	Alone      Phase = "alone"          // primary: the standby is silent and looked for; not protected
	Switching  Phase = "switching-over" // primary: the guest stands, to be handed over to the standby
	Ready      Phase = "ready"          // standby: has at least one epoch and could take over
	TakingOver Phase = "taking-over"    // standby: failover is under way
	Active     Phase = "active"         // standby: took over, the guest runs here now
	Ending     Phase = "ending"         // protection is being taken down
	Ended      Phase = "ended"          // no protection; the process is gone or going
)

// Status is everything one can ask about one side of one protection. Durations
// are in microseconds, sizes in bytes, unless the name says otherwise.
type Status struct {
	Role       Role      `json:"role"`
	Domain     string    `json:"domain"`
	UUID       string    `json:"uuid"`
	Phase      Phase     `json:"phase"`
	Peer       string    `json:"peer"`       // the other side: a libvirt URI or a host name
	Generation uint64    `json:"generation"` // grows with every protection of the guest
	Since      time.Time `json:"since"`      // when Phase was entered

	Error string `json:"error,omitempty"` // why protection ended, when it was not asked to
	Hint  string `json:"hint,omitempty"`  // what the operator can do about it

	Arbiter   string `json:"arbiter"`        // who decides a failover: "none", …
	Automatic bool   `json:"automatic"`      // the standby takes over by itself
	Risk      string `json:"risk,omitempty"` // what this set-up cannot guarantee, in a sentence

	Trigger             string `json:"trigger,omitempty"`
	HeartbeatIntervalMS int64  `json:"heartbeat_interval_ms"`
	HeartbeatTimeoutMS  int64  `json:"heartbeat_timeout_ms"`

	Port int `json:"port,omitempty"` // standby: TCP port it listens on

	CopyBytes int64 `json:"copy_bytes"` // first copy: sent or received so far
	CopyTotal int64 `json:"copy_total"` // first copy: the guest's memory

	Epoch     uint64 `json:"epoch"`      // last committed epoch; 0 means none
	PagesLast int64  `json:"pages_last"` // pages in the last committed epoch
	BytesLast int64  `json:"bytes_last"`
	Bytes     int64  `json:"bytes"` // since protection began, first copy included

	PauseLast int64 `json:"pause_last_us"` // suspend request to resumed
	PauseMax  int64 `json:"pause_max_us"`
	PauseSum  int64 `json:"pause_sum_us"`

	SuspendLast int64 `json:"suspend_last_us"` // the last pause in its parts
	CopyLast    int64 `json:"copy_last_us"`
	ResumeLast  int64 `json:"resume_last_us"`

	CommitLag int64 `json:"commit_lag_us"` // resumed to acknowledged, last epoch

	Reconnects int64 `json:"reconnects"` // connections that replaced one that broke
	Resyncs    int64 `json:"resyncs"`    // epochs that the standby refused and was sent again

	// primary: where the guest runs now, if it was handed over to the standby
	SwitchedOver string `json:"switched_over,omitempty"`

	Failover *Failover `json:"failover,omitempty"` // standby: what happened at take-over
	Verified *Verified `json:"verified,omitempty"` // primary: the last comparison of both sides' memory
}

// Verified is a comparison of the standby's memory with the guest's, page by page.
// Pages are named as 0x1f, the first 64 of each kind.
type Verified struct {
	At    time.Time `json:"at"`
	Epoch uint64    `json:"epoch"`
	Pause int64     `json:"pause_us"` // of the guest, for it

	Pages     int64    `json:"pages"`   // compared
	Differ    int64    `json:"differ"`  // of them, but for those that are shared
	Missing   int64    `json:"missing"` // of all that differ, those that the standby has nothing of
	Differing []string `json:"differing,omitempty"`

	// Pages that differ and that others than the guest write to at any time, such as
	// the rings of its devices: no fault.
	Shared      int64        `json:"shared_differ"`
	SharedPages []SharedPage `json:"shared_differing,omitempty"`

	Moved  int64  `json:"written_meanwhile"` // by others while the guest stood; compared as they were captured
	Unread int64  `json:"unread"`            // pages left out, since they could not be read
	Note   string `json:"note,omitempty"`    // what is not known, in a sentence
}

// SharedPage is a page, and with whom the guest shares it.
type SharedPage struct {
	Page string `json:"page"`
	By   string `json:"by"`
}

// Failover is a take-over in its parts, in microseconds.
type Failover struct {
	Reason   string    `json:"reason"`
	At       time.Time `json:"at"`          // when the loss was declared
	Detect   int64     `json:"detect_us"`   // last sign of life to the loss declared
	Takeover int64     `json:"takeover_us"` // loss declared to libvirt having resumed the guest
}
