package core_test

import (
	"fmt"
	"strings"
	"time"

	"kemari/migrate/core"
)

// What events and actions look like in stories and traces.

var arrived = map[core.MessageType]func(*core.Message) string{
	core.Hello: func(m *core.Message) string {
		s := fmt.Sprintf(" epoch %d next %d", m.Epoch, m.Next)
		if m.Alone {
			s += " alone"
		}
		return s
	},
	core.Welcome: func(m *core.Message) string {
		if m.Armed {
			return fmt.Sprintf(" epoch %d armed", m.Epoch)
		}
		return fmt.Sprintf(" epoch %d", m.Epoch)
	},
	core.Data:      func(m *core.Message) string { return fmt.Sprintf(" epoch %d part %d", m.Epoch, m.Seq) },
	core.EpochEnd:  func(m *core.Message) string { return fmt.Sprintf(" epoch %d", m.Epoch) },
	core.Ack:       func(m *core.Message) string { return fmt.Sprintf(" epoch %d", m.Epoch) },
	core.Heartbeat: func(m *core.Message) string { return "" },
	core.Refuse:    func(m *core.Message) string { return ": " + m.Reason.String() },
	core.End:       func(m *core.Message) string { return ": " + m.Reason.String() },
	core.Ended:     func(m *core.Message) string { return ": " + m.Reason.String() },
	core.Over:      func(m *core.Message) string { return "" },
	core.Heard:     func(m *core.Message) string { return "" },
	core.Resync:    func(m *core.Message) string { return fmt.Sprintf(" epoch %d: %v", m.Epoch, m.Reason) },
	core.Restart:   func(m *core.Message) string { return fmt.Sprintf(" epoch %d", m.Epoch) },
	core.Handover:  func(m *core.Message) string { return fmt.Sprintf(" epoch %d", m.Epoch) },
	core.Sums:      func(m *core.Message) string { return fmt.Sprintf(" epoch %d", m.Epoch) },
	core.Compared:  func(m *core.Message) string { return fmt.Sprintf(" epoch %d", m.Epoch) },
}

func messageText(m *core.Message) string {
	return fmt.Sprintf("%v in round %d%s", m.Type, m.Round, arrived[m.Type](m))
}

func questionText(q core.Question) string {
	return fmt.Sprintf("round %d since %d", q.Round, q.Since)
}

func eventText(e *core.Event) string {
	switch e.Kind {
	case core.Received:
		return "received " + messageText(&e.Message)
	case core.Gone, core.Dialed, core.DialFailed, core.Bad:
		s := fmt.Sprintf("%v round %d", e.Kind, e.Round)
		if e.Clean {
			s += ", closed by the other host"
		}
		return s
	case core.Copied:
		return fmt.Sprintf("Copied epoch %d, %d pages", e.Epoch, e.Pages)
	case core.Captured, core.CheckpointFailed:
		s := fmt.Sprintf("%v epoch %d", e.Kind, e.Epoch)
		if e.Lost {
			s += ", log-dirty was lost"
		}
		return s
	case core.Answered:
		s := fmt.Sprintf("Answered %v (%s)", e.Verdict, questionText(e.Question))
		if e.For > 0 {
			s += fmt.Sprintf(" for %v", e.For)
		}
		return s
	}
	return e.Kind.String()
}

func actionText(a *core.Action) string {
	words := []string{strings.ToLower(a.Kind.String())}
	flag := func(set bool, name string) {
		if set {
			words = append(words, name)
		}
	}
	switch a.Kind {
	case core.Send:
		return "send " + messageText(&a.Message)
	case core.Ask:
		return "ask the arbiter: " + questionText(a.Question)
	case core.Dial, core.Close:
		words = append(words, fmt.Sprintf("round %d", a.Round))
	case core.Finish:
		return "finish: " + a.Reason.String()
	case core.Copy, core.Checkpoint, core.Cancel, core.SendEpoch, core.Release, core.Discard, core.Stage, core.Commit, core.Apply, core.Compare, core.TakeOver:
		words = append(words, fmt.Sprintf("epoch %d", a.Epoch))
	}
	if a.Kind == core.Copy && !a.Full {
		words = append(words, fmt.Sprintf("since %d", a.Base))
	}
	flag(a.Full, "full")
	flag(a.Kind == core.Checkpoint && !a.Seal, "under the old seal")
	flag(a.Cold, "cold")
	flag(a.Direct, "direct")
	return strings.Join(words, " ")
}

func timeText(t core.Time) string {
	return time.Duration(t).Round(10 * time.Microsecond).String()
}
