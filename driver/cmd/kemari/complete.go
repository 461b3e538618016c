package main

import (
	"errors"
	"fmt"
	"os/exec"
	"slices"
	"strings"

	"kemari/xml"
)

// bash completes virsh's words by virsh itself: virsh complete -- WORD... prints
// what the last word may become. For migrate the real virsh is asked without what
// is ours, and ours is added.

// optionValues are those of our options that take one of a few words.
var optionValues = map[string][]string{
	"kemari-transport": xml.Transports,
	"kemari-trigger":   {xml.TriggerOutput, xml.TriggerInterval},
	"kemari-arbiter":   {xml.ArbiterNone},
}

// completed returns the words to complete, if they are those of migrate.
func completed(rest []string) ([]string, bool) {
	if len(rest) < 4 || rest[0] != "complete" || rest[1] != "--" || rest[2] != "migrate" {
		return nil, false
	}
	return rest[2:], true
}

// virshComplete prints what the real virsh would, and ours after it.
func virshComplete(h *host, args, words []string) int {
	theirs, offered, onlyOurs := completions(words)
	for _, w := range offered {
		fmt.Fprintln(h.out, w)
	}
	if onlyOurs {
		return 0
	}
	path, err := realVirsh(h.getenv("PATH"), self)
	if err != nil {
		return 127
	}
	cmd := exec.Command(path, append(slices.Clone(args[:len(args)-len(words)]), theirs...)...)
	cmd.Args[0] = "virsh"
	cmd.Stdout, cmd.Stderr = h.out, h.err
	err = cmd.Run()
	var exit *exec.ExitError
	switch {
	case err == nil || len(offered) > 0:
		return 0
	case errors.As(err, &exit):
		return max(exit.ExitCode(), 1)
	}
	return 1
}

// completions returns the words without ours, what we offer for the last of them,
// and whether that is a value of one of our options, which nobody else can know.
func completions(words []string) (theirs, offered []string, onlyOurs bool) {
	last := words[len(words)-1]
	seen := map[string]bool{}
	for i := 0; i < len(words); i++ {
		w := words[i]
		name, _, hasValue := strings.Cut(strings.TrimPrefix(w, "--"), "=")
		o := ownOption(w, name)
		if o == nil || i == len(words)-1 {
			theirs = append(theirs, w)
			continue
		}
		seen[name] = true
		if o.kind == boolean || hasValue {
			continue
		}
		if i++; i == len(words)-1 {
			for _, v := range optionValues[name] {
				if strings.HasPrefix(v, last) {
					offered = append(offered, v)
				}
			}
			return nil, offered, true
		}
	}
	if last != "" && !strings.HasPrefix(last, "-") {
		return theirs, nil, false
	}
	for _, o := range options {
		if o.help != "" && !seen[o.name] && strings.HasPrefix("--"+o.name, last) {
			offered = append(offered, "--"+o.name)
		}
	}
	return theirs, offered, false
}

// ownOption is the option of ours that the word w is, or nil.
func ownOption(w, name string) *option {
	if !isOption(w) {
		return nil
	}
	if o := find(name); o != nil && o.help != "" {
		return o
	}
	return nil
}
