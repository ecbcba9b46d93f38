// SPDX-License-Identifier: Apache-2.0

package main

import (
	"fmt"
	"os"
	"strings"
	"time"

	"github.com/cohort-project/cohort/integration/shop"
	"github.com/cohort-project/cohort/integration/shop/harness"
)

// title begins a step; the function that it returns ends it with its time.
func (d *demo) title(name, what string) func() {
	d.step++
	fmt.Printf("%s  %s\n", bold(fmt.Sprintf("%d %-11s", d.step, name)), what)
	began := time.Now()
	return func() { fmt.Printf("                %s\n", dim(fmt.Sprintf("%.1f s", time.Since(began).Seconds()))) }
}

// note says something about the step at hand.
func (d *demo) note(format string, args ...any) {
	fmt.Printf("                "+format+"\n", args...)
}

// printCut prints what the checkpoint says of itself.
func (d *demo) printCut() {
	c := d.cut
	var total float64
	var line []string
	for _, phase := range harness.Phases {
		total += c.PhasesMS[phase]
		line = append(line, fmt.Sprintf("%s %.1f", phase, c.PhasesMS[phase]))
	}
	d.note("epoch %d, %s of %.0f ms; skew between members %.1f ms", c.Number, bold(fmt.Sprintf("stopped for %.1f ms", c.StopMS)), total, c.SkewMS)
	d.note("ms: %s", strings.Join(line, ", "))
	for _, m := range c.Members {
		d.note("%-6s %2d processes, stopped %6.1f ms, memory %9s, storage %9s  %s",
			m.Name, m.Processes, m.StopMS, size(m.MemoryBytes), size(m.StorageBytes), m.Image)
	}
}

var invariants = []struct {
	name shop.Invariant
	what string
}{
	{shop.I1, "every order answered before the cut is in PostgreSQL, which holds one instant's orders"},
	{shop.I2, "Redis counted exactly the orders that PostgreSQL has"},
	{shop.I3, "the same processes, the same connections between members, no error"},
	{shop.I4, "sequence numbers never went back"},
}

func (d *demo) printInvariants(err error) {
	for _, i := range invariants {
		verdict := green("holds ")
		if shop.Violated(err, i.name) {
			verdict = red("BROKEN")
		}
		d.note("%s %s  %s", i.name, verdict, i.what)
	}
}

// summary ends a demo that went well.
func (d *demo) summary(took time.Duration) {
	at, last := d.evidence.Restored, d.evidence.AfterState
	fmt.Printf(`
%s
  The shop stood still for %.1f ms (%.1f ms as its clients felt it), was destroyed, and came back with
  the %d orders of that instant. Its %d connections to PostgreSQL and %d to Redis never noticed. It has
  served %d orders since, and everything in it agrees.

`, bold(fmt.Sprintf("Done in %.0f s: every invariant held.", took.Seconds())),
		d.cut.StopMS, d.felt.MaxGapMS, at.PGCount, len(at.Conns.PG), at.Conns.Redis, last.PGCount-at.PGCount)
	if d.keep {
		fmt.Printf("The restored shop is still running. Look closer:\n\n")
		if d.root != "" {
			fmt.Printf("  eval \"$(make -s up)\"\n")
		}
		fmt.Printf(`  cohort ps
  cohort inspect %[1]s
  ctr images ls name~=%[2]s
  ctr task ls
  ctr task exec -t --exec-id look %[3]s-cache redis-cli get shop:orders
  nsenter --net=%[4]s curl -s http://%[5]s/state
`, d.ref, strings.SplitN(d.ref, ":", 2)[0], group, d.shop.NetNS, d.shop.Addr)
		if d.root != "" {
			fmt.Printf("  make down\n")
		}
		return
	}
	fmt.Printf("Look closer:\n\n  make demo KEEP=1        leaves the restored shop running and says what to try\n" +
		"  eval \"$(make -s up)\"    a shell in which ctr and cohort work; `make down` ends it\n")
}

func size(bytes int64) string {
	switch {
	case bytes >= 1<<30:
		return fmt.Sprintf("%.1f GiB", float64(bytes)/(1<<30))
	case bytes >= 1<<20:
		return fmt.Sprintf("%.1f MiB", float64(bytes)/(1<<20))
	default:
		return fmt.Sprintf("%.1f KiB", float64(bytes)/(1<<10))
	}
}

// wrap writes a command over lines that fit below a step's name.
func wrap(words []string) string {
	var b strings.Builder
	column := 0
	for _, w := range words {
		if column > 0 && column+len(w) > 90 {
			b.WriteString(" \\\n                    ")
			column = 0
		} else if column > 0 {
			b.WriteByte(' ')
		}
		b.WriteString(w)
		column += len(w) + 1
	}
	return b.String()
}

// serverVersion finds the daemon's version in what `ctr version` prints.
func serverVersion(out string) string {
	_, server, _ := strings.Cut(out, "Server:")
	for line := range strings.Lines(server) {
		if v, ok := strings.CutPrefix(strings.TrimSpace(line), "Version:"); ok {
			return strings.TrimSpace(v)
		}
	}
	return "(unknown version)"
}

var terminal = func() bool {
	st, err := os.Stdout.Stat()
	return err == nil && st.Mode()&os.ModeCharDevice != 0 && os.Getenv("NO_COLOR") == ""
}()

func color(code, s string) string {
	if !terminal {
		return s
	}
	return "\x1b[" + code + "m" + s + "\x1b[0m"
}

func bold(s string) string  { return color("1", s) }
func dim(s string) string   { return color("2", s) }
func green(s string) string { return color("32", s) }
func red(s string) string   { return color("31", s) }
