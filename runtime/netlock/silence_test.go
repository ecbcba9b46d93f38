// SPDX-License-Identifier: Apache-2.0

package netlock

import (
	"errors"
	"net"
	"os"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// quiet is a time in which the kernel would have repeated a FIN: one that rules
// dropped on its way out comes again after half a second
// (include/net/tcp.h, TCP_RESOURCE_PROBE_INTERVAL).
const quiet = 1500 * time.Millisecond

// hears tells what a reader of c learns within the time: nil for nothing.
func hears(t *testing.T, c net.Conn, within time.Duration) error {
	t.Helper()
	_ = c.SetReadDeadline(time.Now().Add(within))
	_, err := c.Read(make([]byte, 1))
	if errors.Is(err, os.ErrDeadlineExceeded) {
		return nil
	}
	if err == nil {
		t.Fatal("a byte came from nowhere")
	}
	return err
}

func TestPeersOutsideHearOfConnectionsThatARestoreCloses(t *testing.T) {
	for name, tc := range map[string]struct {
		prepare func(netns, name string) (*Rules, error)
		want    error
	}{
		"resets pass":    {func(ns, name string) (*Rules, error) { return PrepareRestore(ns, name, true) }, unix.ECONNRESET},
		"nothing passes": {func(ns, name string) (*Rules, error) { return PrepareRestore(ns, name, false) }, nil},
	} {
		t.Run(name, func(t *testing.T) {
			member, outside := newNS(t), newNS(t)
			wire(t, member, outside)
			_, far := across(t, member, outside, "10.9.0.2")
			_, far6 := across(t, member, outside, "fd09::2")
			r, err := tc.prepare(member, "restore")
			if err != nil {
				t.Fatal(err)
			}
			defer r.Remove()
			if err := r.Close(); err != nil {
				t.Fatal(err)
			}
			if _, err := CloseOutside(member, nil); errors.Is(err, unix.EOPNOTSUPP) {
				require(t, false, "CONFIG_INET_DIAG_DESTROY")
			} else if err != nil {
				t.Fatal(err)
			}
			for _, c := range []net.Conn{far, far6} {
				if err := hears(t, c, quiet); !errors.Is(err, tc.want) {
					t.Errorf("the outside end heard %v, want %v", err, tc.want)
				}
			}
		})
	}
}

func TestRulesThatLetResetsOutAreClosedToAllElse(t *testing.T) {
	member, outside := newNS(t), newNS(t)
	wire(t, member, outside)
	near, far := across(t, member, outside, "10.9.0.2")
	r, err := PrepareRestore(member, "restore", true)
	if err != nil {
		t.Fatal(err)
	}
	defer r.Remove()
	if err := r.Close(); err != nil {
		t.Fatal(err)
	}
	for _, end := range [][2]net.Conn{{near, far}, {far, near}} {
		if _, err := end[0].Write([]byte("x")); err != nil {
			t.Fatal(err)
		}
		if err := hears(t, end[1], quiet); err != nil {
			t.Errorf("a closed connection's end heard %v", err)
		}
	}
}

func TestOrphansEndUnheard(t *testing.T) {
	for name, destroyed := range map[string]bool{"destroyed": true, "left alone": false} {
		t.Run(name, func(t *testing.T) {
			member, outside := newNS(t), newNS(t)
			wire(t, member, outside)
			dying, far := across(t, member, outside, "10.9.0.2")
			living, farLiving := across(t, member, outside, "10.9.0.2")
			held, err := Connections(member)
			if err != nil {
				t.Fatal(err)
			}
			r, err := Prepare(member, "stop")
			if err != nil {
				t.Fatal(err)
			}
			defer r.Remove()
			if err := r.Close(); err != nil {
				t.Fatal(err)
			}
			dying.Close() // what the kernel does for a process that is killed
			if destroyed {
				closed, err := CloseOrphans(member, held)
				if errors.Is(err, unix.EOPNOTSUPP) {
					require(t, false, "CONFIG_INET_DIAG_DESTROY")
				}
				if err != nil || len(closed) != 1 {
					t.Fatalf("closed %v (%v), want one connection", closed, err)
				}
			}
			if err := r.Remove(); err != nil {
				t.Fatal(err)
			}
			// The control: an orphan that is left alone is heard.
			within := quiet
			if !destroyed {
				within *= 10 // it ends when it is heard
			}
			if err := hears(t, far, within); (err == nil) != destroyed {
				t.Errorf("the peer heard %v", err)
			}
			if _, err := living.Write([]byte("still")); err != nil {
				t.Fatal(err)
			}
			expect(t, farLiving, []byte("still"))
		})
	}
}

func TestWhatCRIUMarksPassesTheRulesOfARestore(t *testing.T) {
	ns := newNS(t)
	loUp(t, ns)
	for name, tc := range map[string]struct {
		prepare func(netns, name string) (*Rules, error)
		passes  bool
	}{
		"of a restore":    {func(ns, name string) (*Rules, error) { return PrepareRestore(ns, name, false) }, true},
		"of a checkpoint": {Prepare, false},
	} {
		t.Run(name, func(t *testing.T) {
			r, err := tc.prepare(ns, "mark")
			if err != nil {
				t.Fatal(err)
			}
			defer r.Remove()
			if err := r.Close(); err != nil {
				t.Fatal(err)
			}
			for _, mark := range []int{0, 0xC114} {
				in(t, ns, func() error {
					fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM, 0)
					if err != nil {
						return err
					}
					defer unix.Close(fd)
					if err := unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_MARK, mark); err != nil {
						return err
					}
					// To itself: the packet keeps its mark on its way in.
					if err := unix.Bind(fd, &unix.SockaddrInet4{Addr: [4]byte{127, 0, 0, 1}}); err != nil {
						return err
					}
					self, err := unix.Getsockname(fd)
					if err != nil {
						return err
					}
					sendErr := unix.Sendto(fd, []byte("x"), 0, self)
					_, _, recvErr := unix.Recvfrom(fd, make([]byte, 1), unix.MSG_DONTWAIT)
					if passed := sendErr == nil && recvErr == nil; passed != (tc.passes && mark != 0) {
						t.Errorf("mark %#x passed: %v (%v, %v)", mark, passed, sendErr, recvErr)
					}
					return nil
				})
			}
		})
	}
}

func TestANamespaceThatIsCutOffAnswersNobody(t *testing.T) {
	member, outside := newNS(t), newNS(t)
	wire(t, member, outside)
	r, err := Prepare(member, "stop")
	if err != nil {
		t.Fatal(err)
	}
	defer r.Remove()
	dial := func() (err error) {
		in(t, outside, func() error {
			d := net.Dialer{Timeout: 500 * time.Millisecond}
			_, err = d.Dial("tcp", "10.9.0.1:9")
			return nil
		})
		return err
	}
	if err := dial(); !errors.Is(err, unix.ECONNREFUSED) {
		t.Fatalf("before: %v, want %v", err, unix.ECONNREFUSED)
	}
	if err := r.CutOff(); err != nil {
		t.Fatal(err)
	}
	if err := r.Remove(); err != nil {
		t.Fatal(err)
	}
	if err := dial(); err == nil || errors.Is(err, unix.ECONNREFUSED) {
		t.Errorf("after: %v, want silence", err)
	}
}
