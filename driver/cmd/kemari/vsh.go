package main

import (
	"errors"
	"strings"
)

// globals are the options that stand before virsh's command.
type globals struct {
	connect                 string
	readonly, quiet, timing bool
	info                    bool // help or a version is asked for, and nothing else
}

// globalOptions is virsh's table; the value says whether the option takes an
// argument.
var globalOptions = []struct {
	long     string
	short    byte
	argument bool
}{
	{"connect", 'c', true},
	{"debug", 'd', true},
	{"escape", 'e', true},
	{"help", 'h', false},
	{"keepalive-interval", 'k', true},
	{"keepalive-count", 'K', true},
	{"log", 'l', true},
	{"quiet", 'q', false},
	{"readonly", 'r', false},
	{"timing", 't', false},
	{"version", 'v', false}, // an argument only as --version=TYPE
	{"", 'V', false},
}

func (g *globals) set(short byte, value string) {
	switch short {
	case 'c':
		g.connect = value
	case 'q':
		g.quiet = true
	case 'r':
		g.readonly = true
	case 't':
		g.timing = true
	case 'h', 'v', 'V':
		g.info = true
	}
}

var errGlobals = errors.New("not virsh's options")

// parseGlobals reads the options before the command as getopt_long does for
// virsh: names may be shortened, letters joined, and the first word that is no
// option ends them. It returns the words from there on.
func parseGlobals(args []string) (g globals, rest []string, err error) {
	for len(args) > 0 {
		a := args[0]
		if len(a) < 2 || a[0] != '-' {
			break
		}
		args = args[1:]
		if a == "--" {
			break
		}
		if a[1] == '-' {
			args, err = g.long(a[2:], args)
		} else {
			args, err = g.letters(a[1:], args)
		}
		if err != nil {
			return g, nil, err
		}
	}
	return g, args, nil
}

func (g *globals) long(a string, args []string) ([]string, error) {
	name, value, hasValue := strings.Cut(a, "=")
	match := -1
	for i, o := range globalOptions {
		if o.long == name {
			match = i
			break
		}
		if o.long != "" && strings.HasPrefix(o.long, name) {
			if match >= 0 {
				return nil, errGlobals // ambiguous
			}
			match = i
		}
	}
	if match < 0 {
		return nil, errGlobals
	}
	o := globalOptions[match]
	if o.argument && !hasValue {
		if len(args) == 0 {
			return nil, errGlobals
		}
		value, args = args[0], args[1:]
	} else if !o.argument && hasValue && o.long != "version" {
		return nil, errGlobals
	}
	g.set(o.short, value)
	return args, nil
}

func (g *globals) letters(a string, args []string) ([]string, error) {
next:
	for i := range len(a) {
		for _, o := range globalOptions {
			if o.short != a[i] {
				continue
			}
			if !o.argument {
				g.set(o.short, "")
				continue next
			}
			if value := a[i+1:]; value != "" {
				g.set(o.short, value)
				return args, nil
			}
			if len(args) == 0 {
				return nil, errGlobals
			}
			g.set(o.short, args[0])
			return args[1:], nil
		}
		return nil, errGlobals
	}
	return args, nil
}

// commands returns the words of each command that virsh would run. A single
// argument is a line of its own little language, with quotes and semicolons.
func commands(rest []string) ([][]string, error) {
	switch len(rest) {
	case 0:
		return nil, nil
	case 1:
		return splitLine(rest[0])
	}
	return [][]string{rest}, nil
}

var errLine = errors.New("not a line of virsh's")

func splitLine(s string) ([][]string, error) {
	var all [][]string
	var words []string
	end := func() {
		if len(words) > 0 {
			all = append(all, words)
		}
		words = nil
	}
	for {
		for s != "" && (s[0] == ' ' || s[0] == '\t' || strings.HasPrefix(s, "\\\n")) {
			s = strings.TrimPrefix(s, "\\")[1:]
		}
		if s == "" {
			end()
			return all, nil
		}
		switch s[0] {
		case ';', '\n':
			end()
			s = s[1:]
			continue
		case '#': // a comment, to the end of the line
			end()
			_, s, _ = strings.Cut(s, "\n")
			continue
		}
		word, rest, err := nextWord(s)
		if err != nil {
			return nil, err
		}
		words, s = append(words, word), rest
	}
}

func nextWord(s string) (word, rest string, err error) {
	var b strings.Builder
	var single, double bool
	i := 0
	for ; i < len(s); i++ {
		c := s[i]
		switch {
		case !single && !double && strings.IndexByte(" \t;\n", c) >= 0:
			return b.String(), s[i:], nil
		case !double && c == '\'':
			single = !single
			continue
		case !single && c == '"':
			double = !double
			continue
		case !single && c == '\\':
			if i++; i == len(s) {
				return "", "", errLine
			}
			if s[i] == '\n' {
				continue
			}
			c = s[i]
		}
		b.WriteByte(c)
	}
	if double {
		return "", "", errLine
	}
	return b.String(), "", nil
}

// intent is whose a call of virsh is.
type intent int

const (
	theirs   intent = iota // the real virsh's
	ours                   // a migrate with --kemari
	help                   // the real virsh's help for migrate, to which ours is added
	complete               // what the real virsh would complete, to which ours is added
)

// call is a call of virsh that is ours.
type call struct {
	globals
	options migrateOptions
	words   []string // to be completed, migrate being the first
	err     error    // what is wrong with it
}

// inspect decides whose a call of virsh is. It is ours only if virsh itself would
// read --kemari as an option of migrate: not as another option's value, nor in a
// command line that virsh would not understand.
func inspect(args []string) (intent, call) {
	g, rest, err := parseGlobals(args)
	if err != nil || g.info {
		return theirs, call{}
	}
	if words, ok := completed(rest); ok {
		return complete, call{globals: g, words: words}
	}
	cmds, err := commands(rest)
	if err != nil {
		return theirs, call{}
	}
	for _, words := range cmds {
		if len(cmds) == 1 && len(words) == 2 && words[0] == "help" && words[1] == "migrate" {
			return help, call{}
		}
		if words[0] != "migrate" {
			continue
		}
		o, kemari, err := parseMigrate(words[1:])
		switch {
		case o.help && len(cmds) == 1:
			return help, call{}
		case kemari && len(cmds) > 1:
			return ours, call{globals: g, err: errors.New("--kemari goes with one command at a time")}
		case kemari:
			return ours, call{globals: g, options: o, err: err}
		}
	}
	return theirs, call{}
}
