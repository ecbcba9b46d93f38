// SPDX-License-Identifier: Apache-2.0

package shop

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"testing"
	"time"
)

var begin = time.Unix(1_700_000_000, 0)

func at(ms int) time.Time { return begin.Add(time.Duration(ms) * time.Millisecond) }

func ack(seq int64, sent, acked int) Ack {
	return Ack{
		OrderAnswer: OrderAnswer{Seq: seq, Token: fmt.Sprintf("token-%04d-%d", seq, sent), Count: seq},
		Sent:        at(sent), Acked: at(acked),
	}
}

func order(a Ack) Order { return Order{Seq: a.Seq, Token: a.Token} }

func state(n int64) State {
	c := Conns{PG: []int64{31, 32}, Redis: 2, RedisIDs: []int64{3, 4}}
	return State{BootID: "b", PGCount: n, RedisCount: n, MaxSeq: n, Conns: c, Server: c}
}

// history is a checkpoint that went well. Order n is sent at 10n ms and
// answered 5 ms later; the cut is at 103 ms, when order 10 is under way: the
// restored shop completes it. Orders 11 to 15 were placed after the cut and
// are gone; the restored shop gives their numbers out again.
func history() Evidence {
	e := Evidence{
		Cut:    Window{at(98), at(109)},
		Load:   &Log{Complete: true},
		Before: state(3), Restored: state(10), After: &Log{Complete: true},
	}
	for n := 1; n <= 15; n++ {
		a := ack(int64(n), 10*n, 10*n+5)
		e.Load.Acks = append(e.Load.Acks, a)
		if n <= 10 {
			e.Orders = append(e.Orders, order(a))
		}
	}
	e.AfterOrders = slices.Clone(e.Orders)
	for n := 11; n <= 20; n++ {
		a := ack(int64(n), 1000+10*n, 1000+10*n+5)
		e.After.Acks = append(e.After.Acks, a)
		e.AfterOrders = append(e.AfterOrders, order(a))
	}
	last := state(20)
	e.AfterState = &last
	return e
}

func TestARestoreOfOneInstantPasses(t *testing.T) {
	if err := Check(history()); err != nil {
		t.Fatal(err)
	}
}

func TestLoadAfterTheRestoreIsOptional(t *testing.T) {
	e := history()
	e.After, e.AfterState, e.AfterOrders = nil, nil, nil
	if err := Check(e); err != nil {
		t.Fatal(err)
	}
}

func TestEachBrokenPromiseIsFound(t *testing.T) {
	drop := func(o []Order, i int) []Order { return slices.Delete(slices.Clone(o), i, i+1) }
	for _, tc := range []struct {
		name   string
		want   Invariant
		damage func(*Evidence)
	}{
		{"an acknowledged order is lost", I1, func(e *Evidence) {
			e.Orders = drop(e.Orders, 4)
			e.Restored.PGCount, e.Restored.RedisCount = 9, 9
		}},
		{"an acknowledged order is stored under another number", I1, func(e *Evidence) {
			e.Orders[4].Seq = 77
		}},
		{"all orders are lost", I1, func(e *Evidence) {
			e.Orders = nil
			e.Restored.PGCount, e.Restored.RedisCount = 0, 0
		}},
		{"an order placed after a lost one was answered is there", I1, func(e *Evidence) {
			e.Cut = Window{at(0), at(1000)} // a window that demands nothing
			e.Orders = drop(e.Orders, 4)
			e.Restored.PGCount, e.Restored.RedisCount = 9, 9
		}},
		{"an unanswered order placed after a lost one was answered is there", I1, func(e *Evidence) {
			e.Cut = Window{at(0), at(1000)}
			e.Load.Attempts = append(e.Load.Attempts, Attempt{Token: "late", Sent: at(140)})
			e.Orders = append(e.Orders, Order{Seq: 11, Token: "late"})
			e.Restored.PGCount, e.Restored.RedisCount, e.Restored.MaxSeq = 11, 11, 11
			e.After, e.AfterState, e.AfterOrders = nil, nil, nil
		}},
		{"an order placed after the cut is there", I1, func(e *Evidence) {
			for _, a := range e.Load.Acks[10:] {
				e.Orders = append(e.Orders, order(a))
			}
			e.Restored = state(15)
			e.After, e.AfterState, e.AfterOrders = nil, nil, nil
		}},
		{"a token nobody sent is there", I1, func(e *Evidence) {
			e.Load.Acks = slices.DeleteFunc(e.Load.Acks, func(a Ack) bool { return a.Seq == 7 })
		}},
		{"an order older than the load is lost", I1, func(e *Evidence) {
			e.Base = []Order{{Seq: 0, Token: "old"}}
		}},
		{"an order answered by the restored shop is lost", I1, func(e *Evidence) {
			e.AfterOrders = drop(e.AfterOrders, 15)
		}},
		{"a restored order disappears later", I1, func(e *Evidence) {
			e.AfterOrders = drop(e.AfterOrders, 2)
		}},
		{"Redis is older than PostgreSQL", I2, func(e *Evidence) { e.Restored.RedisCount = 9 }},
		{"Redis is newer than PostgreSQL", I2, func(e *Evidence) { e.Restored.RedisCount = 11 }},
		{"Redis falls behind after the restore", I2, func(e *Evidence) { e.AfterState.RedisCount = 19 }},
		{"Redis disagrees before the cut", I2, func(e *Evidence) { e.Before.RedisCount = 1 }},
		{"more apart than is in flight", I2, func(e *Evidence) { e.Before.InFlight, e.Before.RedisCount = 2, 0 }},
		{"Redis counts one number twice", I2, func(e *Evidence) { e.After.Acks[5].Count = e.After.Acks[4].Count }},
		{"the table is not what the count says", I2, func(e *Evidence) {
			e.Restored.PGCount, e.Restored.RedisCount = 12, 12
		}},
		{"the application was started again", I3, func(e *Evidence) { e.Restored.BootID = "c" }},
		{"the application does not say who it is", I3, func(e *Evidence) { e.Restored.BootID, e.Before.BootID = "", "" }},
		{"an error on a connection", I3, func(e *Evidence) { e.Restored.PoolErrors = 1 }},
		{"an error on a connection under new load", I3, func(e *Evidence) { e.AfterState.PoolErrors = 1 }},
		{"an error on a connection before the cut", I3, func(e *Evidence) { e.Before.PoolErrors = 1 }},
		{"a connection was made again", I3, func(e *Evidence) { e.Restored.Reconnects = 1 }},
		{"another backend", I3, func(e *Evidence) { e.Restored.Conns.PG = []int64{31, 39} }},
		{"another Redis client", I3, func(e *Evidence) { e.Restored.Conns.RedisIDs = []int64{3, 9} }},
		{"PostgreSQL lost a backend", I3, func(e *Evidence) { e.Restored.Server.PG = []int64{31} }},
		{"Redis lost a client", I3, func(e *Evidence) { e.AfterState.Server.RedisIDs = []int64{3} }},
		{"no connection was ever seen", I3, func(e *Evidence) {
			e.Before.Conns.PG, e.Restored.Conns.PG, e.AfterState.Conns.PG = nil, nil, nil
		}},
		{"a number goes back before the cut", I4, func(e *Evidence) {
			e.Load.Acks[1].Seq, e.Load.Acks[2].Seq = e.Load.Acks[2].Seq, e.Load.Acks[1].Seq
		}},
		{"a number goes back after the restore", I4, func(e *Evidence) {
			e.After.Acks[1].Seq, e.After.Acks[2].Seq = e.After.Acks[2].Seq, e.After.Acks[1].Seq
		}},
		{"a number is given twice", I4, func(e *Evidence) { e.After.Acks[1].Seq = e.After.Acks[0].Seq }},
		{"the restored shop gives out an old number", I4, func(e *Evidence) {
			e.After.Acks = append(e.After.Acks, ack(10, 990, 995))
		}},
		{"the restored shop is older than its state before the cut", I4, func(e *Evidence) { e.Restored.MaxSeq = 2 }},
		{"the table's numbers fall", I4, func(e *Evidence) { slices.Reverse(e.Orders) }},
	} {
		t.Run(tc.name, func(t *testing.T) {
			e := history()
			tc.damage(&e)
			err := Check(e)
			if !Violated(err, tc.want) {
				t.Fatalf("want a violation of %s, have: %v", tc.want, err)
			}
		})
	}
}

func TestOrdersInFlightMayBeApart(t *testing.T) {
	e := history()
	e.Before.InFlight, e.Before.RedisCount = 2, 1
	if err := Check(e); err != nil {
		t.Fatal(err)
	}
}

func TestOrdersUnderWayAtTheCutMayBeNumberedAnew(t *testing.T) {
	e := history()
	// Order 10 was under way at the cut, together with one that the shop which
	// ran on numbered after it and the restored one before it.
	other := ack(11, 100, 106)
	e.Load.Acks[10] = other
	e.Orders[9].Seq = 11
	e.Orders = slices.Insert(e.Orders, 9, Order{Seq: 10, Token: other.Token})
	e.Restored = state(11)
	e.AfterOrders = slices.Concat(e.Orders, e.AfterOrders[11:])
	e.After.Acks = e.After.Acks[1:]
	if err := Check(e); err != nil {
		t.Fatal(err)
	}
}

func TestAKilledClientsLogDoesNotAccuse(t *testing.T) {
	e := history()
	e.Load.Complete = false
	e.Load.Acks = slices.DeleteFunc(e.Load.Acks, func(a Ack) bool { return a.Seq == 10 })
	if err := Check(e); err != nil {
		t.Fatal(err)
	}
}

func TestViolatedLooksThroughEveryWrapping(t *testing.T) {
	e := history()
	e.Restored.RedisCount, e.Restored.Reconnects = 1, 1
	err := fmt.Errorf("round 3: %w", Check(e))
	if !Violated(err, I2) || !Violated(err, I3) || Violated(err, I1) || Violated(err, I4) || Violated(nil, I1) {
		t.Fatal(err)
	}
}

func TestALogIsReadAsItWasWritten(t *testing.T) {
	var file bytes.Buffer
	w := NewLogWriter(&file)
	w.Ack(ack(1, 10, 15))
	w.Attempt(Attempt{Token: "x", Worker: 2, Sent: at(20), Err: "reset"})
	w.Ack(ack(2, 1000, 1005))
	if err := w.End(); err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(t.TempDir(), "log")
	write := func(b []byte) *Log {
		t.Helper()
		if err := os.WriteFile(path, b, 0o600); err != nil {
			t.Fatal(err)
		}
		l, err := ReadLog(path)
		if err != nil {
			t.Fatal(err)
		}
		return l
	}
	l := write(file.Bytes())
	if len(l.Acks) != 2 || len(l.Attempts) != 1 || !l.Complete || l.Acks[0].Token != ack(1, 10, 15).Token || !l.Acks[1].Acked.Equal(at(1005)) {
		t.Fatalf("read back %+v", l)
	}
	before, after := l.Split(at(500))
	if len(before.Acks) != 1 || len(before.Attempts) != 1 || len(after.Acks) != 1 {
		t.Fatalf("split into %+v and %+v", before, after)
	}
	if l := write(file.Bytes()[:file.Len()-3]); l.Complete || len(l.Acks) != 2 {
		t.Fatalf("a log that is still being written was read as %+v", l)
	}
}
