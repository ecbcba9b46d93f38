// SPDX-License-Identifier: Apache-2.0

package shop

import (
	"errors"
	"fmt"
	"slices"
	"sort"
	"time"
)

// Invariant names one of the four promises that Check holds a restore against.
type Invariant string

// The invariants, as the package's documentation states them.
const (
	I1 Invariant = "I1"
	I2 Invariant = "I2"
	I3 Invariant = "I3"
	I4 Invariant = "I4"
)

// Violation is one broken invariant.
type Violation struct {
	Invariant Invariant
	Detail    string
}

func (v *Violation) Error() string { return string(v.Invariant) + ": " + v.Detail }

// Violated tells whether err, as returned by Check, has a violation of i.
func Violated(err error, i Invariant) bool {
	switch e := err.(type) { //nolint:errorlint // walks the whole tree, not the first match
	case *Violation:
		return e.Invariant == i
	case interface{ Unwrap() []error }:
		for _, one := range e.Unwrap() {
			if Violated(one, i) {
				return true
			}
		}
	case interface{ Unwrap() error }:
		return Violated(e.Unwrap(), i)
	}
	return false
}

// Window is the time in which the cut lies, by the load client's clock: from
// an instant surely before the first member was frozen to one surely after
// the last was running again. The shorter it is, the more I1 demands.
type Window struct{ From, To time.Time }

// Evidence is what was seen of one checkpoint and its restore.
type Evidence struct {
	// Cut is when the checkpoint was taken.
	Cut Window
	// Load is what the client saw of the shop that was checkpointed, before
	// the cut and after it.
	Load *Log
	// Before is that shop's state some time before the cut.
	Before State
	// Base holds orders that were in PostgreSQL before Load began, if any.
	Base []Order

	// Restored and Orders are the restored shop's state and table, asked with
	// no order in flight and before any new one was placed.
	Restored State
	Orders   []Order

	// After is what a client saw of the restored shop, AfterState and
	// AfterOrders how that shop stood when the client was done. All three may
	// be absent: they add to what is checked.
	After       *Log
	AfterState  *State
	AfterOrders []Order
}

// Check returns nil when all four invariants hold, else an error that joins a
// *Violation for everything that is wrong. It needs no running shop and
// changes nothing.
func Check(e Evidence) error {
	c := &checker{Evidence: e, rows: index(e.Orders)}
	c.acknowledged()
	c.prefix()
	c.counts()
	c.connections()
	c.sequence()
	return errors.Join(c.found...)
}

type checker struct {
	Evidence
	// rows is the restored table, by token.
	rows  map[string]int64
	found []error
}

// mostNamed is how many offenders of one kind are named one by one.
const mostNamed = 3

func (c *checker) fail(i Invariant, format string, args ...any) {
	c.found = append(c.found, &Violation{Invariant: i, Detail: fmt.Sprintf(format, args...)})
}

// acknowledged checks I1's first half.
func (c *checker) acknowledged() {
	var missing, promised int
	for _, a := range c.Load.acks() {
		// Orders under way at the cut go on twice, in the shop that ran on and in
		// the restored one, and may be numbered in another order there.
		if !a.Acked.Before(c.Cut.From) {
			continue
		}
		seq, there := c.rows[a.Token]
		if there && seq != a.Seq {
			c.fail(I1, "token %.8s was acknowledged as order %d and is stored as %d", a.Token, a.Seq, seq)
		}
		promised++
		if !there {
			if missing++; missing <= mostNamed {
				c.fail(I1, "order %d (token %.8s), acknowledged %v before the cut, is not in PostgreSQL",
					a.Seq, a.Token, c.Cut.From.Sub(a.Acked))
			}
		}
	}
	if missing > mostNamed {
		c.fail(I1, "%d of %d orders acknowledged before the cut are not in PostgreSQL", missing, promised)
	}
	subset(c, c.Base, c.rows, "stored before the load began", "restored")
	if c.AfterOrders != nil {
		later := index(c.AfterOrders)
		subset(c, c.Orders, later, "stored when the shop was restored", "final")
		for _, a := range c.After.acks() {
			if seq, there := later[a.Token]; !there || seq != a.Seq {
				c.fail(I1, "order %d, acknowledged by the restored shop, is not in PostgreSQL", a.Seq)
				break
			}
		}
	}
}

func subset(c *checker, some []Order, all map[string]int64, what, where string) {
	for _, o := range some {
		if seq, there := all[o.Token]; !there || seq != o.Seq {
			c.fail(I1, "order %d, %s, is not in the %s table", o.Seq, what, where)
			return
		}
	}
}

// prefix checks I1's second half. There must be one instant that has every
// order of the restored table sent before it, and every answer to an order
// that is not in the table after it.
func (c *checker) prefix() {
	type event struct {
		at  time.Time
		seq int64
	}
	var lastPresent, firstMissing event
	known := make(map[string]bool)
	for _, a := range c.Load.acks() {
		known[a.Token] = true
		if _, there := c.rows[a.Token]; there {
			if a.Sent.After(lastPresent.at) {
				lastPresent = event{a.Sent, a.Seq}
			}
		} else if firstMissing.at.IsZero() || a.Acked.Before(firstMissing.at) {
			firstMissing = event{a.Acked, a.Seq}
		}
	}
	if c.Load != nil {
		for _, a := range c.Load.Attempts {
			known[a.Token] = true
			if seq, there := c.rows[a.Token]; there && a.Sent.After(lastPresent.at) {
				lastPresent = event{a.Sent, seq}
			}
		}
	}
	if !firstMissing.at.IsZero() && lastPresent.at.After(firstMissing.at) {
		c.fail(I1, "order %d is in PostgreSQL although it was placed %v after order %d, which is not, was answered: not one instant's state",
			lastPresent.seq, lastPresent.at.Sub(firstMissing.at), firstMissing.seq)
	}
	if lastPresent.at.After(c.Cut.To) {
		c.fail(I1, "order %d was placed %v after the cut and is in PostgreSQL", lastPresent.seq, lastPresent.at.Sub(c.Cut.To))
	}
	if c.Load == nil || !c.Load.Complete {
		return
	}
	for _, o := range c.Base {
		known[o.Token] = true
	}
	for _, o := range c.Orders {
		// What is not above Before's numbers may be older than the log.
		if o.Seq > c.Before.MaxSeq && !known[o.Token] {
			c.fail(I1, "order %d in PostgreSQL has a token that no client sent", o.Seq)
			return
		}
	}
}

// counts checks I2.
func (c *checker) counts() {
	check := func(when string, s State) {
		apart := s.PGCount - s.RedisCount
		if apart > s.InFlight || -apart > s.InFlight {
			c.fail(I2, "%s PostgreSQL has %d orders and Redis counted %d, with %d in flight", when, s.PGCount, s.RedisCount, s.InFlight)
		}
	}
	check("before the cut", c.Before)
	check("after the restore", c.Restored)
	if n := int64(len(c.Orders)); n != c.Restored.PGCount {
		c.fail(I2, "after the restore PostgreSQL counts %d orders and lists %d", c.Restored.PGCount, n)
	}
	if c.AfterState != nil {
		check("after new orders", *c.AfterState)
	}
	c.realTime(I2, "Redis's counter", "before the restore", c.Load.acks(), func(a Ack) int64 { return a.Count })
	c.realTime(I2, "Redis's counter", "after the restore", c.After.acks(), func(a Ack) int64 { return a.Count })
}

// connections checks I3.
func (c *checker) connections() {
	check := func(when string, s State) {
		if s.BootID == "" || s.BootID != c.Before.BootID {
			c.fail(I3, "%s the application is another process (%q, was %q)", when, s.BootID, c.Before.BootID)
		}
		if s.PoolErrors != 0 {
			c.fail(I3, "%s the application has seen %d errors on its connections: %s", when, s.PoolErrors, s.LastError)
		}
		if s.Reconnects != 0 {
			c.fail(I3, "%s the application has dialed %d times again", when, s.Reconnects)
		}
		for _, v := range []struct {
			what       string
			have, want []int64
		}{
			{"connections to PostgreSQL", s.Conns.PG, c.Before.Conns.PG},
			{"connections to Redis", s.Conns.RedisIDs, c.Before.Conns.RedisIDs},
			{"PostgreSQL's backends", s.Server.PG, c.Before.Server.PG},
			{"Redis's clients", s.Server.RedisIDs, c.Before.Server.RedisIDs},
		} {
			if len(v.want) == 0 || !slices.Equal(v.have, v.want) {
				c.fail(I3, "%s %s are %v, were %v", when, v.what, v.have, v.want)
			}
		}
	}
	check("before the cut", c.Before)
	check("after the restore", c.Restored)
	if c.AfterState != nil {
		check("after new orders", *c.AfterState)
	}
}

// sequence checks I4.
func (c *checker) sequence() {
	seq := func(a Ack) int64 { return a.Seq }
	c.realTime(I4, "the sequence", "before the restore", c.Load.acks(), seq)
	c.realTime(I4, "the sequence", "after the restore", c.After.acks(), seq)

	if c.Restored.MaxSeq < c.Before.MaxSeq {
		c.fail(I4, "the highest order is %d after the restore and was %d before the cut", c.Restored.MaxSeq, c.Before.MaxSeq)
	}
	floor, why := c.Restored.MaxSeq, "the restored table's highest"
	for _, a := range c.Load.acks() {
		if a.Acked.Before(c.Cut.From) && a.Seq > floor {
			floor, why = a.Seq, "acknowledged before the cut"
		}
	}
	for _, a := range c.After.acks() {
		if a.Seq <= floor {
			c.fail(I4, "the restored shop gave out order %d, not above %d (%s)", a.Seq, floor, why)
			break
		}
	}
	if !slices.IsSortedFunc(c.Orders, func(a, b Order) int { return int(a.Seq - b.Seq) }) {
		c.fail(I4, "the restored table's sequence is not rising")
	}
}

// realTime checks that a counter which is handed out one by one was seen to
// rise: an order placed after another was answered got the higher number, and
// no number was given twice.
func (c *checker) realTime(i Invariant, what, when string, acks []Ack, number func(Ack) int64) {
	bySent, byAcked := slices.Clone(acks), slices.Clone(acks)
	sort.SliceStable(bySent, func(i, j int) bool { return bySent[i].Sent.Before(bySent[j].Sent) })
	sort.SliceStable(byAcked, func(i, j int) bool { return byAcked[i].Acked.Before(byAcked[j].Acked) })
	given := make(map[int64]bool, len(acks))
	var highest int64
	done := 0
	for _, a := range bySent {
		for done < len(byAcked) && byAcked[done].Acked.Before(a.Sent) {
			highest = max(highest, number(byAcked[done]))
			done++
		}
		n := number(a)
		if given[n] {
			c.fail(i, "%s gave out %d twice %s", what, n, when)
			return
		}
		given[n] = true
		if n <= highest {
			c.fail(i, "%s went back %s: %d was given out after %d had been", what, when, n, highest)
			return
		}
	}
}

func (l *Log) acks() []Ack {
	if l == nil {
		return nil
	}
	return l.Acks
}

func index(orders []Order) map[string]int64 {
	rows := make(map[string]int64, len(orders))
	for _, o := range orders {
		rows[o.Token] = o.Seq
	}
	return rows
}
