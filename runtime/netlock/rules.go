// SPDX-License-Identifier: Apache-2.0

package netlock

import (
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"regexp"
	"strings"
	"sync"

	"github.com/containerd/errdefs"
	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"
)

const (
	tablePrefix = "cohort-"
	setName     = "closed"
	// The chains come before every chain that people use: raw is at -300,
	// conntrack's defragmentation at -400 (linux/netfilter_ipv4.h).
	priority = -450
)

// The name is part of the table's, which the kernel limits to 255 bytes
// (NFT_NAME_MAXLEN, linux/netfilter/nf_tables.h).
var nameRule = sync.OnceValue(func() *regexp.Regexp { return regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9_.-]{0,200}$`) })

// The set has one possible element. It is looked up with a constant, so its
// presence alone decides.
var element = []nftables.SetElement{{Key: []byte{0, 0, 0, 0}}}

// Rules are the communication rules of one caller in one network namespace. They
// are safe for concurrent use.
type Rules struct {
	name string

	mu     sync.Mutex
	ns     *os.File
	conn   *nftables.Conn
	table  *nftables.Table
	set    *nftables.Set
	closed bool
}

// Prepare puts the table of name into the network namespace, open: packets pass.
// Everything that Close and Open need is opened, so that they are one netlink
// transaction each. Remove is its undo.
//
// It fails with errdefs.ErrFailedPrecondition for the host's namespace, and with
// errdefs.ErrAlreadyExists when a table of that name is there (RemoveStale
// removes it).
func Prepare(netns, name string) (*Rules, error) {
	return prepare(netns, name, nil, exceptions{})
}

// PrepareRestore is Prepare for a namespace that CRIU restores into. What CRIU
// itself sends passes closed rules: it puts the end of a stream into a socket by a
// packet of its own. So do resets that leave, if asked for: CloseOutside then tells
// peers outside. No namespace with closed rules takes one in.
func PrepareRestore(netns, name string, resets bool) (*Rules, error) {
	pass := exceptions{both: marked}
	if resets {
		pass.output = reset
	}
	return prepare(netns, name, nil, pass)
}

// exceptions are what passes closed rules.
type exceptions struct{ both, output []expr.Any }

var (
	// marked lets CRIU's packets pass, which carry SOCCR_MARK (soccr/soccr.h).
	marked = []expr.Any{
		&expr.Meta{Key: expr.MetaKeyMARK, Register: unix.NFT_REG_1},
		&expr.Cmp{Op: expr.CmpOpEq, Register: unix.NFT_REG_1, Data: binary.NativeEndian.AppendUint32(nil, 0xC114)},
		&expr.Verdict{Kind: expr.VerdictAccept},
	}
	// reset lets a TCP segment with RST set pass (RFC 9293, 3.1: byte 13, bit 2).
	reset = []expr.Any{
		&expr.Meta{Key: expr.MetaKeyL4PROTO, Register: unix.NFT_REG_1},
		&expr.Cmp{Op: expr.CmpOpEq, Register: unix.NFT_REG_1, Data: []byte{unix.IPPROTO_TCP}},
		&expr.Payload{DestRegister: unix.NFT_REG_1, Base: expr.PayloadBaseTransportHeader, Offset: 13, Len: 1},
		&expr.Bitwise{SourceRegister: unix.NFT_REG_1, DestRegister: unix.NFT_REG_1, Len: 1, Mask: []byte{1 << 2}, Xor: []byte{0}},
		&expr.Cmp{Op: expr.CmpOpNeq, Register: unix.NFT_REG_1, Data: []byte{0}},
		&expr.Verdict{Kind: expr.VerdictAccept},
	}
)

// Lock is Prepare and Close in one transaction, for callers in no hurry.
func Lock(netns, name string) (unlock func() error, err error) {
	r, err := prepare(netns, name, element, exceptions{})
	if err != nil {
		return nil, err
	}
	return r.Remove, nil
}

// Unlock removes the table of name, whoever made it. None is no error.
func Unlock(netns, name string) error { return RemoveStale(netns, name) }

// prepare makes the table.
func prepare(netns, name string, elements []nftables.SetElement, pass exceptions) (_ *Rules, err error) {
	doing := fmt.Sprintf("preparing communication rules %q in %s", name, netns)
	if !nameRule().MatchString(name) {
		return nil, fmt.Errorf("%s: the name must match %s: %w", doing, nameRule(), errdefs.ErrInvalidArgument)
	}
	ns, err := openNS(netns)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", doing, err)
	}
	defer func() {
		if err != nil {
			ns.Close()
		}
	}()
	if err := refuseHost(ns, doing); err != nil {
		return nil, err
	}
	conn, err := nftables.New(nftables.WithNetNSFd(int(ns.Fd())), nftables.AsLasting())
	if err != nil {
		return nil, fmt.Errorf("%s: opening netlink: %w", doing, err)
	}
	r := &Rules{name: name, ns: ns, conn: conn, closed: elements != nil}
	// CreateTable, unlike AddTable, fails where the table exists.
	r.table = conn.CreateTable(&nftables.Table{Name: tablePrefix + name, Family: nftables.TableFamilyINet})
	r.set = &nftables.Set{Table: r.table, Name: setName, KeyType: nftables.TypeMark}
	if err := conn.AddSet(r.set, elements); err != nil {
		return nil, errors.Join(fmt.Errorf("%s: %w", doing, err), conn.CloseLasting())
	}
	for _, hook := range []struct {
		name string
		hook *nftables.ChainHook
		pass [][]expr.Any
	}{
		{"input", nftables.ChainHookInput, [][]expr.Any{pass.both}},
		{"output", nftables.ChainHookOutput, [][]expr.Any{pass.both, pass.output}},
	} {
		chain := conn.AddChain(&nftables.Chain{
			Name: hook.name, Table: r.table, Type: nftables.ChainTypeFilter,
			Hooknum: hook.hook, Priority: nftables.ChainPriorityRef(priority),
		})
		for _, exprs := range hook.pass {
			if exprs != nil {
				conn.AddRule(&nftables.Rule{Table: r.table, Chain: chain, Exprs: exprs})
			}
		}
		conn.AddRule(&nftables.Rule{Table: r.table, Chain: chain, Exprs: []expr.Any{
			&expr.Immediate{Register: unix.NFT_REG_1, Data: element[0].Key},
			&expr.Lookup{SourceRegister: unix.NFT_REG_1, SetName: setName, SetID: r.set.ID},
			&expr.Verdict{Kind: expr.VerdictDrop},
		}})
	}
	if err := conn.Flush(); err != nil {
		if errors.Is(err, unix.EEXIST) {
			err = fmt.Errorf("a table of that name is there; remove it first: %w: %w", errdefs.ErrAlreadyExists, err)
		}
		return nil, errors.Join(fmt.Errorf("%s: %w", doing, err), conn.CloseLasting())
	}
	return r, nil
}

// Close makes the namespace silent. Closed rules stay closed.
func (r *Rules) Close() error { return r.turn(true) }

// Open lets packets pass again. Open rules stay open.
func (r *Rules) Open() error { return r.turn(false) }

func (r *Rules) turn(closed bool) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.conn == nil {
		return fmt.Errorf("communication rules %q were removed: %w", r.name, os.ErrClosed)
	}
	if r.closed == closed {
		return nil
	}
	turn, verb := r.conn.SetDeleteElements, "opening"
	if closed {
		turn, verb = r.conn.SetAddElements, "closing"
	}
	err := turn(r.set, element)
	if err == nil {
		err = r.conn.Flush()
	}
	if err != nil {
		return fmt.Errorf("%s communication rules %q in %s: %w", verb, r.name, r.ns.Name(), err)
	}
	r.closed = closed
	return nil
}

// CutOff takes all links of the namespace down, for one that is about to end:
// nothing reaches it any more, so it does not answer for its dead. There is no
// undo.
func (r *Rules) CutOff() error {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.conn == nil {
		return fmt.Errorf("communication rules %q were removed: %w", r.name, os.ErrClosed)
	}
	h, err := handle(r.ns)
	if err != nil {
		return err
	}
	defer h.Close()
	links, err := retryDump(h.LinkList)
	if err != nil {
		return fmt.Errorf("listing the links of %s: %w", r.ns.Name(), err)
	}
	var errs []error
	for _, l := range links {
		if err := h.LinkSetDown(l); err != nil {
			errs = append(errs, fmt.Errorf("taking link %s of %s down: %w", l.Attrs().Name, r.ns.Name(), err))
		}
	}
	return errors.Join(errs...)
}

// Remove takes the table away and lets the descriptors go. It may be called
// twice, and when the table was removed by someone else.
func (r *Rules) Remove() error {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.conn == nil {
		return nil
	}
	r.conn.DelTable(r.table)
	err := r.conn.Flush()
	if errors.Is(err, unix.ENOENT) {
		err = nil
	}
	if err != nil {
		return fmt.Errorf("removing communication rules %q from %s: %w", r.name, r.ns.Name(), err)
	}
	err = errors.Join(r.conn.CloseLasting(), r.ns.Close())
	r.conn = nil
	return err
}

// RemoveStale removes the table of name from a namespace, whoever made it and
// whatever its state. It is for a janitor after a crash: no table is no error.
func RemoveStale(netns, name string) error {
	doing := fmt.Sprintf("removing communication rules %q from %s", name, netns)
	if !nameRule().MatchString(name) {
		return fmt.Errorf("%s: the name must match %s: %w", doing, nameRule(), errdefs.ErrInvalidArgument)
	}
	ns, err := openNS(netns)
	if err != nil {
		// A namespace that is gone took its rules with it.
		if errdefs.IsNotFound(err) {
			return nil
		}
		return fmt.Errorf("%s: %w", doing, err)
	}
	defer ns.Close()
	conn, err := nftables.New(nftables.WithNetNSFd(int(ns.Fd())))
	if err != nil {
		return fmt.Errorf("%s: opening netlink: %w", doing, err)
	}
	conn.DelTable(&nftables.Table{Name: tablePrefix + name, Family: nftables.TableFamilyINet})
	if err := conn.Flush(); err != nil && !errors.Is(err, unix.ENOENT) {
		return fmt.Errorf("%s: %w", doing, err)
	}
	return nil
}

// Held is one table of this package found in a namespace.
type Held struct {
	Name string
	// Closed is set while the table makes the namespace silent.
	Closed bool
}

// ListLocked finds the tables of this package in a namespace, whoever made them.
func ListLocked(netns string) ([]Held, error) {
	ns, err := openNS(netns)
	if err != nil {
		return nil, err
	}
	defer ns.Close()
	conn, err := nftables.New(nftables.WithNetNSFd(int(ns.Fd())))
	if err != nil {
		return nil, fmt.Errorf("listing communication rules in %s: %w", netns, err)
	}
	tables, err := conn.ListTablesOfFamily(nftables.TableFamilyINet)
	if err != nil {
		return nil, fmt.Errorf("listing communication rules in %s: %w", netns, err)
	}
	var held []Held
	for _, t := range tables {
		name, ours := strings.CutPrefix(t.Name, tablePrefix)
		if !ours {
			continue
		}
		h := Held{Name: name}
		set, err := conn.GetSetByName(t, setName)
		if err == nil {
			var elements []nftables.SetElement
			elements, err = conn.GetSetElements(set)
			h.Closed = len(elements) > 0
		}
		if err != nil && !errors.Is(err, unix.ENOENT) {
			return nil, fmt.Errorf("reading communication rules %q in %s: %w", name, netns, err)
		}
		held = append(held, h)
	}
	return held, nil
}
